"""What the message of a write error proposes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.slide.recipe import _named_write_errors


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.EMFILE, "raise the limit of open files (ulimit -n), or lower --num-workers"),
        (errno.EFBIG, "raise the limit of a file's size (ulimit -f); on FAT, which takes files up to 4 GiB, choose"),
        (errno.EINVAL, "the file system may not take this name: name the result in the column 'id' of a manifest"),
        (errno.ENAMETOOLONG, "the file system may not take this name: name the result in the column 'id' of a mani"),
        (errno.EROFS, "check that the folder exists and may be written"),
    ],
)
def test_a_write_error_proposes_what_helps(tmp_path: Path, number: int, step: str) -> None:
    with pytest.raises(OutputError) as caught, _named_write_errors(Path("a.svs"), tmp_path):
        raise OSError(number, os.strerror(number), "file")
    assert str(caught.value).startswith(f"a.svs: cannot write file: {os.strerror(number)}; {step}")
