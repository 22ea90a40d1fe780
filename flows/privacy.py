"""What Prefect's page gets to read: the pipeline's log, and paths only where they may be shown."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

PACKAGES = ("flows", "pipeline", "models", "wsi")

Said = Callable[[str], str]
"""Takes a text for people and returns it as it may be shown."""


def as_it_is(text: str) -> str:
    """Show everything."""
    return text


def without_folders(folders: Iterable[Path]) -> Said:
    """Make a function that leaves the names of files and takes away these folders and those above them."""
    spellings = {text for folder in folders for text in (str(folder), str(folder.absolute()), os.path.realpath(folder))}
    # Longest first, so that a folder goes as a whole and not only up to one above it.
    hidden = sorted(spellings - {".", "/"}, key=len, reverse=True)

    def said(text: str) -> str:
        for folder in hidden:
            text = text.replace(f"{folder}/", "").replace(folder, "(folder)")
        return text

    return said


@contextmanager
def pipeline_log(said: Said, level: int = logging.INFO) -> Iterator[None]:
    """Write what the pipeline logs into the log of the running flow or task.

    Prefect can do so by itself (PREFECT_LOGGING_EXTRA_LOGGERS), but not from the threads that blocks run on, and with
    every path as it is.
    """
    handler = _RunLog(said)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    former = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(min(level, logger.level or level))
        logger.propagate = False  # the run's log goes to the console, too
    try:
        yield
    finally:
        for logger, (logger_level, propagate) in zip(loggers, former, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(logger_level)
            logger.propagate = propagate


class _RunLog(logging.Handler):
    def __init__(self, said: Said) -> None:
        super().__init__()
        self._said = said
        self._flow_log = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = get_run_logger()
        except MissingContextError:  # a thread that runs blocks
            log = self._flow_log
        log.log(record.levelno, "%s", self._said(record.getMessage()))
