"""What paths lead to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsi.paths import kind_of


def test_files_folders_and_other_things_are_distinguished(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "folder", "nothing"):
        (tmp_path / f"to-{name}").symlink_to(name)
    (tmp_path / "loop").symlink_to("loop")
    names = ("file", "folder", "pipe", "to-file", "to-folder", "to-nothing", "nothing", "file/below", "loop", "a\0b")
    kinds = [kind_of(tmp_path / name) for name in names]
    assert kinds == ["file", "folder", "other", "file", "folder", None, None, None, None, None]


def test_a_path_that_cannot_be_examined_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        kind_of(tmp_path / ("n" * 300))
