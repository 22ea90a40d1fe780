"""Write and read files of regions, which keep the polygons of a block until the regions of all blocks are joined."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely

from pipeline.errors import RegionsFileError
from pipeline.formats.polygons import Region

_MAGIC = b"WSIREG02"
_SCHEMA = pa.schema(
    [
        pa.field("label", pa.uint8(), nullable=False),
        pa.field("open", pa.bool_(), nullable=False),
        pa.field("may_grow", pa.bool_(), nullable=False),
        pa.field("geometry", pa.large_binary(), nullable=False),
    ]
)


def save_regions(path: Path, regions: Sequence[Region]) -> None:
    """Write regions to one compact file with a checksum. The same regions give the same bytes. The caller fsyncs."""
    columns = {
        "label": [region.label for region in regions],
        "open": [region.open for region in regions],
        "may_grow": [region.may_grow for region in regions],
        "geometry": [shapely.to_wkb(region.geometry_out, byte_order=1) for region in regions],
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.table(columns, schema=_SCHEMA))
    payload = sink.getvalue().to_pybytes()
    path.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)


def load_regions(path: Path) -> list[Region]:
    """Return the regions of a file that `save_regions` wrote. Raises RegionsFileError for any other or damaged file."""
    content = path.read_bytes()
    head, digest, payload = content[:8], content[8:40], content[40:]
    if head != _MAGIC:
        raise RegionsFileError(
            f"{path}: is not a file of regions: it begins with {head!r}, not {_MAGIC!r}; delete it and run the same "
            f"command again"
        )
    if hashlib.sha256(payload).digest() != digest:
        raise RegionsFileError(
            f"{path}: is damaged: the checksum of its {len(payload)} bytes differs; delete it and run the same command "
            f"again"
        )
    table = pa.ipc.open_stream(payload).read_all()
    geometries = shapely.from_wkb(np.array(table["geometry"].to_pylist(), dtype=object))
    columns = (table["label"].to_pylist(), geometries, table["open"].to_pylist(), table["may_grow"].to_pylist())
    return [Region(*row) for row in zip(*columns, strict=True)]
