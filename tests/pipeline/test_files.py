"""What helps after a failed write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.files import disk_shortage


@pytest.mark.parametrize(
    ("blocks", "inodes", "said"),
    [
        (512, (9000, 0), "can hold no more files (0 inodes and 2 MiB free); delete some files"),
        (512, (9000, 16), "can hold no more files (16 inodes and 2 MiB free); delete some files"),
        (512, (9000, 17), "is full (2 MiB free); free some space"),
        (0, (9000, 0), "is full (0 MiB free); free some space"),
        (512, (0, 0), "is full (2 MiB free); free some space"),  # btrfs: no limit of inodes
    ],
)
def test_a_full_disk_is_told_from_one_without_inodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, inodes: tuple[int, int], said: str
) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(f_bavail=blocks, f_frsize=4096, f_files=inodes[0], f_favail=inodes[1])

    monkeypatch.setattr(os, "statvfs", statvfs)
    folder = tmp_path / "out"  # could not be made
    assert disk_shortage(OSError(errno.ENOSPC, "No space"), folder) == f"the disk of {folder} {said}"
    assert asked == [tmp_path]


def test_a_used_up_quota_is_not_called_a_full_disk(tmp_path: Path) -> None:
    assert disk_shortage(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path) == (
        f"the disk quota for {tmp_path} is used up; delete files that count toward it, or ask for a larger one"
    )


def test_other_errors_are_no_shortage(tmp_path: Path) -> None:
    assert disk_shortage(OSError(errno.EROFS, "Read-only file system"), tmp_path) is None
