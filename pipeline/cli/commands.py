"""The parts that all console commands share: exit statuses, error messages, logging and common options."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from models.runtimes import BATCH_SIZE, CUDA_BATCH_SIZE

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DeviceOption = Annotated[str, typer.Option(help="Device of the networks: auto, cpu, cuda, cuda:N or mps.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        help="Tiles per call of a network.",
        min=1,
        show_default=f"{BATCH_SIZE}, on CUDA {CUDA_BATCH_SIZE}",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, help="Print more; give it twice for everything.", show_default=False),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def fail(program: str, message: str, status: int = EXIT_FAILED) -> NoReturn:
    """Print why `program` ends to stderr and exit with this status."""
    typer.echo(f"{program}: {message}", err=True)
    sys.exit(status)


def configure_logging(verbose: int, *, quiet: bool) -> None:
    """Log to stderr: errors if `quiet`, else warnings, information or everything."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")


def run(app: Callable[[], object]) -> None:
    """Run a console command's app. Bytes of file names that are not text are printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
