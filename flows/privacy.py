"""What Prefect's page shows: the log of the pipeline, and paths only if they may be shown."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from pipeline.console import printable
from pipeline.files import printable_name

PACKAGES = ("flows", "pipeline", "models", "wsi")

Redact = Callable[[str], str]
"""Takes a text and returns the text that may be shown."""


def as_it_is(text: str) -> str:
    """Return the text unchanged."""
    return text


def without_folders(folders: Iterable[Path | str]) -> Redact:
    """Return a function that removes these folders and their parents from a text, and keeps the names of files.

    Their spellings in messages are removed too: in Python's quotes, with escaped control characters, and in a URI.

    A relative folder of one part, such as `a`, is removed only before a slash or a colon: it can also be a word.
    """
    spellings = {
        spelling
        for folder in folders
        for text in (str(folder), str(Path(folder).absolute()), os.path.realpath(folder))
        for spelling in _spellings(text)
    }
    spellings -= {"", ".", "/"}
    absolute = {text for text in spellings if text.startswith("/")}
    words = {text for text in spellings if "/" not in text}
    end = r"(?:/|(?![\w-]|\.\w))"
    hidden = re.compile(
        "|".join(
            f"{before}(?:{_any_of(texts)}){after}"
            for before, texts, after in (
                (r"(?<![\w.-])", absolute, end),
                (r"(?<![\w./-])", spellings - absolute - words, end),
                (r"(?<![\w./-])", words, "(?:/|(?=:))"),
            )
            if texts
        )
        or "(?!)"  # matches nothing
    )
    return lambda text: hidden.sub(lambda found: "" if found[0].endswith("/") else "(folder)", text)


def _spellings(path: str) -> tuple[str, ...]:
    """Return the ways in which messages spell a path."""
    # Python escapes single quotes only if the text also contains double quotes, such as those of a file's name.
    quoted, also_escaped = repr(path)[1:-1], repr(f'"{path}')[2:-1]
    return path, quoted, also_escaped, printable(path), printable_name(path), quote(os.fsencode(path))


def _any_of(texts: Iterable[str]) -> str:
    # The longest first, because a parent's path is the start of its folder's path.
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


@contextmanager
def pipeline_log(redact: Redact, level: int = logging.INFO) -> Iterator[None]:
    """Copy the log of the pipeline to the log of the running flow or task.

    Prefect's own setting for this (PREFECT_LOGGING_EXTRA_LOGGERS) misses the threads that run blocks, and shows every
    path.
    """
    handler = _RunLog(redact)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    former = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(min(level, logger.level or level))
        logger.propagate = False  # the run's log also goes to the console
    try:
        yield
    finally:
        for logger, (logger_level, propagate) in zip(loggers, former, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(logger_level)
            logger.propagate = propagate


class _RunLog(logging.Handler):
    def __init__(self, redact: Redact) -> None:
        super().__init__()
        self._redact = redact
        self._flow_log = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = get_run_logger()
        except MissingContextError:  # a thread that runs blocks
            log = self._flow_log
        log.log(record.levelno, "%s", printable(self._redact(record.getMessage())))
