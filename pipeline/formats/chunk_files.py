"""The chunk files of a stored map, read and written without Zarr.

Zarr hands each chunk to other threads. These threads take several times the processor time of the chunk itself.
The files are those that Zarr would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numcodecs import Blosc, blosc

from pipeline.files import replacing

UInt8Array = npt.NDArray[np.uint8]

# With its own threads, Blosc stores the parts of a chunk in the order in which they finish, so the bytes vary.
blosc.use_threads = False
# QuPath can open neither plain zstd nor blosc's automatic shuffle.
CODEC = Blosc(cname="zstd", clevel=3, shuffle=Blosc.SHUFFLE)


def read_chunk(plane: Path, side: int, row: int, column: int) -> UInt8Array:
    """Return a square chunk of the plane in a folder. A chunk without a file is 0."""
    try:
        content = (plane / f"{row}" / f"{column}").read_bytes()
    except FileNotFoundError:
        return np.zeros((side, side), np.uint8)
    return np.frombuffer(CODEC.decode(content), np.uint8).reshape(side, side)


def write_chunk(plane: Path, chunk_HW: UInt8Array, row: int, column: int) -> None:
    """Replace the file of a chunk, without syncing. A chunk of zeros has no file; an old file is removed."""
    file = plane / f"{row}" / f"{column}"
    if not chunk_HW.any():
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, synced=False) as partial:
        partial.write_bytes(CODEC.encode(np.ascontiguousarray(chunk_HW)))


def sweep_partial_files(path: Path) -> None:
    """Remove the files of killed writes from a store. A write that is still in progress fails."""
    for file in sorted(path.rglob("*.partial")):
        # A worker that was given up as lost can finish its write meanwhile.
        file.unlink(missing_ok=True)


def chunk_positions(plane: Path) -> Iterator[tuple[int, int]]:
    """Yield (row, column) of the chunk files of a plane."""
    rows = (child for child in plane.iterdir() if child.is_dir()) if plane.exists() else ()
    for row in rows:
        for file in row.iterdir():
            if file.name.isdecimal():
                yield int(row.name), int(file.name)
