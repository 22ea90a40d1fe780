"""The command as a process of its own, with the bytes that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.repository import REPOSITORY


def program(*arguments: str, folder: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run `wsi-segment` in a folder; `options` say where its output goes."""
    code = "from pipeline.cli.segment import main; main()"
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
        **options,  # type: ignore[call-overload] # stdout and stderr
    )
    return done
