"""What all console commands share: exit statuses, how they fail, and output streams that take any file name."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def fail(program: str, message: str, status: int = EXIT_FAILED) -> NoReturn:
    """Say on stderr why `program` ends, and end it with this exit status."""
    typer.echo(f"{program}: {message}", err=True)
    sys.exit(status)


def run(app: Callable[[], object]) -> None:
    """Run a console command's app; names of files that are no text are printed with their bytes escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
