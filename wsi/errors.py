"""Errors about slides, and the base class of every error in this project.

WsiSegmentError              base of every error that this project raises
├── SlideError               a slide cannot be used
│   ├── SlideNotFoundError   the slide file does not exist
│   ├── SlideFormatError     no reader can open the file
│   ├── SlideReadError       the file opens, but its pixels cannot be read
│   └── ResolutionError      the pixel size is unknown, or does not fit the model
├── ModelError               see models/errors.py
└── PipelineError            see pipeline/errors.py

Every message starts with the file name and ends with the next step. This module imports nothing of the project, so that
`models` can import the base class without loading a slide reader.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Literal


class WsiSegmentError(Exception):
    """Base of every error that this project raises; `except WsiSegmentError` catches them all."""


class SlideError(WsiSegmentError):
    """A slide cannot be used."""


class SlideNotFoundError(SlideError):
    """The slide file does not exist."""


class SlideFormatError(SlideError):
    """No reader can open the file."""


class SlideReadError(SlideError):
    """The file opens, but its pixels cannot be read."""


class ResolutionError(SlideError):
    """The pixel size is unknown, or does not fit the model."""


Shortage = Literal["out of memory", "out of threads", "out of file handles"]
"""What a machine, or the limits of a process, can have too little of."""

_NUMBERS: dict[int | None, Shortage] = {
    errno.ENOMEM: "out of memory",
    errno.EMFILE: "out of file handles",
    errno.ENFILE: "out of file handles",
}

_TEXTS: dict[str, tuple[Shortage | None, bool]] = {
    # "cannot allocate memory in static TLS block": too many libraries, not too little memory
    "static tls": (None, False),
    "out of memory": ("out of memory", True),  # CUDA, cairo
    "allocate memory": ("out of memory", True),  # "can't" in torch, "Cannot" in the C library
    "insufficient memory": ("out of memory", True),  # OpenCV, libjpeg
    "not enough memory": ("out of memory", True),  # torch on Windows
    "failed to allocate": ("out of memory", True),
    "bad_alloc": ("out of memory", False),  # C++
    "bad allocation": ("out of memory", False),  # C++ on Windows
    "failed to map segment": ("out of memory", False),  # the loader of libraries
    "can't start new thread": ("out of threads", False),  # Python
    "resource temporarily unavailable": ("out of threads", False),  # C++
}
"""Texts of libraries that raise RuntimeError or an error of their own, in lower case. The first that matches counts.

The second value states whether decoders also use the text for a damaged file that claims too large a size.
"""


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def shortage(error: BaseException | None, *, decoding: bool = False) -> Shortage | None:
    """Return what the machine had too little of, if an error or one of its causes reports this; None otherwise.

    With `decoding`, texts that a damaged file can also cause do not count.
    """
    return next((found for one in with_causes(error) if (found := _reported(one, decoding=decoding))), None)


def _reported(error: BaseException, *, decoding: bool) -> Shortage | None:
    if isinstance(error, MemoryError):
        return "out of memory"
    # The texts of these errors contain names of files.
    if isinstance(error, WsiSegmentError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return _NUMBERS.get(error.errno)
    text = str(error).lower()
    what, is_of_damaged_files = next((found for part, found in _TEXTS.items() if part in text), (None, False))
    return None if decoding and is_of_damaged_files else what
