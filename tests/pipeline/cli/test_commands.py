"""What all console commands share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.repository import REPOSITORY

SPACE = "free some space and run the same command again, or choose another place"


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        ("ENOSPC", None, f"output: cannot be written: No space left on device; {SPACE}"),
        ("ENOSPC", "run/a.csv", f"run/a.csv: cannot be written: No space left on device; {SPACE}"),
        (
            "EIO",
            "a.png",
            "a.png: cannot be read or written: Input/output error; check the disk, then run the same command again",
        ),
        ("EDQUOT", None, f"output: cannot be written: Disk quota exceeded; {SPACE}"),
    ],
)
def test_a_command_that_a_full_disk_ends_does_not_call_its_results_complete(
    number: str, file: str | None, said: str
) -> None:
    code = (
        "import errno, os\n"
        "from pipeline.cli.commands import run\n"
        "def app():\n"
        f"    raise OSError(errno.{number}, os.strerror(errno.{number}), {file!r})\n"
        "run(app)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert done.stderr == said + "\n"
