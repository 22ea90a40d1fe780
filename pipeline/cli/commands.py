"""The parts that all console commands share: exit statuses, error messages, logging and common options."""

from __future__ import annotations

import errno
import getpass
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from models.runtimes import ACCELERATOR_BATCH_SIZE, BATCH_SIZE
from pipeline.console import log_to_stderr, printable
from pipeline.errors import ConfigError, TrainConfigError
from wsi.errors import WsiSegmentError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

MOST_FILES = 10_240
"""macOS takes no larger number if it states no limit. Containers can allow a billion, and some programs that a command
starts close every number up to the limit."""

DeviceOption = Annotated[
    str, typer.Option(help="Device of the networks: auto, or a name in torch: cpu, cuda, cuda:N, xpu or mps.")
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        help="Canvases per call of a network.",
        min=1,
        show_default=f"{BATCH_SIZE}, on a GPU {ACCELERATOR_BATCH_SIZE}",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, help="Print more; give it twice for everything.", show_default=False),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def version_option(program: str) -> Any:  # Any: typer's own class has no public name
    """Return the option that prints the version of `program` and ends it.

    The parameter of a command has the name `_version`, because the command does not use it.
    """

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version  # slow to import

            typer.echo(f"{program} {version('wsi-segment')}")
            raise typer.Exit

    return typer.Option("--version", is_eager=True, callback=show, help="Print the version and exit.")


def fail(program: str, message: str, status: int = EXIT_FAILED) -> NoReturn:
    """Print why `program` ends to stderr and exit with this status."""
    typer.echo(f"{program}: {printable(message)}", err=True)
    sys.exit(status)


def fail_with(program: str, error: WsiSegmentError) -> NoReturn:
    """Print an error and exit: with status 2 if an option, a setting or an input cannot be used, else with 1."""
    is_usage = isinstance(error, (ConfigError, TrainConfigError))
    fail(program, str(error), EXIT_USAGE if is_usage else EXIT_FAILED)


def annotator_name(program: str, given: str | None) -> str:
    """Return the name that was given, or else the user name. Exit if this user has no name, or if it is not text."""
    try:
        name = given or getpass.getuser()
    except (ImportError, KeyError, OSError):  # as in a container that runs as a number; the kind depends on Python
        fail(program, "this user has no user name; pass your name with --annotator", EXIT_USAGE)
    try:
        name.encode()
    except UnicodeEncodeError:  # neither the page nor the file of labels can contain it
        fail(program, f"the name {name!a} is not valid UTF-8; pass another --annotator", EXIT_USAGE)
    return name


def configure_logging(verbose: int, *, quiet: bool) -> None:
    """Log to stderr: errors if `quiet`, else warnings, information or everything."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    log_to_stderr(level)


def run(app: Callable[[], object]) -> None:
    """Run a console command's app. Bytes of file names that are not text are printed escaped.

    If the output is closed, as by `| head`, or a disk is full or has an error, the command ends with status 1 and
    without a traceback.
    """
    if sys.platform == "win32":
        fail("wsi-segment", "needs Linux or macOS; on Windows, use WSL")
    _open_standard_files()
    _raise_limit_of_open_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _discard_output()
        if error.errno == errno.EPIPE:
            sys.exit(EXIT_FAILED)
        if error.errno == errno.EIO:
            fail(
                str(error.filename or "output"),
                f"cannot be read or written: {error.strerror}; check the disk, then run the same command again",
            )
        # An error of a write names no file, so the results may be incomplete.
        fail(
            str(error.filename or "output"),
            f"cannot be written: {error.strerror}; free some space and run the same command again, or choose another "
            "place",
        )


def _open_standard_files() -> None:
    """Open the standard files that the caller closed.

    Otherwise the next file that is opened, such as one of a result, gets their numbers, and a library that prints
    writes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _raise_limit_of_open_files() -> None:
    """Allow this process as many open files as its user may have, but not more than `MOST_FILES`.

    The usual limit is 256 on macOS and 1024 on Linux.
    """
    if sys.platform == "win32":
        return
    import resource  # does not exist on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Linux refuses every change if the kernel's own limit was lowered below `hard`, and macOS can allow a process
        # fewer files than `hard`. The command then keeps its limit.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _discard_output() -> None:
    # Python would try to write the rest at its end, and fail again.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
