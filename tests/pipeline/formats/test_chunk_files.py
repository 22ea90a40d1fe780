"""Chunk files: the same bytes every time, and never a part of a file. Shape suffixes: H and W a chunk."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.formats.chunk_files import UInt8Array, chunk_positions, read_chunk, write_chunk


def random_chunk(side: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def test_a_chunk_is_read_as_it_was_written_and_a_chunk_of_zeros_has_no_file(tmp_path: Path) -> None:
    chunk_HW = random_chunk(64)
    write_chunk(tmp_path, chunk_HW.T, 3, 12)  # not contiguous
    np.testing.assert_array_equal(read_chunk(tmp_path, 64, 3, 12), chunk_HW.T)
    assert list(chunk_positions(tmp_path)) == [(3, 12)]
    (tmp_path / "3" / ".13.0a1b.partial").write_bytes(b"half")
    assert list(chunk_positions(tmp_path)) == [(3, 12)]
    write_chunk(tmp_path, np.zeros_like(chunk_HW), 3, 12)
    assert not read_chunk(tmp_path, 64, 3, 12).any()
    assert list(chunk_positions(tmp_path)) == []
    assert list(chunk_positions(tmp_path / "missing")) == []


def test_every_write_gives_the_same_bytes_in_a_process_that_does_not_import_zarr(tmp_path: Path) -> None:
    # A large chunk: Blosc compresses its parts in threads unless they are off, and importing Zarr turns them off.
    program = """
import hashlib, sys
from pathlib import Path
import numpy as np
from pipeline.formats.chunk_files import write_chunk
chunk_HW = np.random.default_rng(0).integers(0, 9, (512, 512), dtype=np.uint8)
found = set()
for _ in range(100):
    write_chunk(Path(sys.argv[1]), chunk_HW, 0, 0)
    found.add(hashlib.sha256((Path(sys.argv[1]) / "0" / "0").read_bytes()).hexdigest())
print(len(found), "zarr" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "False"]


def test_a_failed_write_keeps_the_old_chunk_and_leaves_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chunk(tmp_path, random_chunk(64), 0, 0)
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write_chunk(tmp_path, random_chunk(64, seed=1), 0, 0)
    np.testing.assert_array_equal(read_chunk(tmp_path, 64, 0, 0), random_chunk(64))
    assert [file.name for file in (tmp_path / "0").iterdir()] == ["0"]


def test_writers_of_one_chunk_do_not_disturb_each_other_and_readers_see_whole_chunks(tmp_path: Path) -> None:
    # A worker that was given up as lost can still write while another one does its work again.
    chunk_HW = random_chunk(256)
    write_chunk(tmp_path, chunk_HW, 0, 0)

    def check(_: int) -> None:
        np.testing.assert_array_equal(read_chunk(tmp_path, 256, 0, 0), chunk_HW)

    with ThreadPoolExecutor(6) as pool:
        writes = [pool.submit(write_chunk, tmp_path, chunk_HW, 0, 0) for _ in range(200)]
        list(pool.map(check, range(600)))
        for write in writes:
            write.result()
    assert [file.name for file in (tmp_path / "0").iterdir()] == ["0"]
