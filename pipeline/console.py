"""Text for terminals and logs: names of files cannot move the cursor, forge lines or change the direction of text."""

from __future__ import annotations

import json
import logging
import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters (Unicode category Cc) and the marks that change the direction of text."""


def printable(text: str) -> str:
    """Return the text with control characters as Python's escapes: they begin commands to a terminal, or new lines."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_json(value: object) -> str:
    """Return a value as JSON in several lines without control characters. Other letters stay readable."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in text.split("\n"))


class PrintableFormatter(logging.Formatter):
    """Formats log records without control characters. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        """Return the traceback of a record."""
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type] # typeshed's private name of the type
        # Indented, because a line break in a file's name would otherwise begin a line like those of the log.
        return "\n".join(f"  {printable(line)}" for line in lines)


def log_to_stderr(level: int) -> None:
    """Log to stderr from this level on, unless logging is configured already."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    silence_tifffile(level)


def silence_tifffile(level: int | None = None) -> None:
    """Silence tifffile unless `level` is DEBUG. None: the level of this process's root logger.

    tifffile logs each damaged tag without the slide's name. Our own errors and warnings report the damage.
    """
    if (logging.getLogger().level if level is None else level) > logging.DEBUG:
        logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
