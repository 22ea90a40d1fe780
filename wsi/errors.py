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
from typing import Literal, NamedTuple


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


class _Text(NamedTuple):
    """What a library reports with a text."""

    what: Shortage | None
    of_damaged_files: bool = False
    """Whether decoders also use the text for a damaged file that claims too large a size."""


_TEXTS = {
    # "cannot allocate memory in static TLS block": too many libraries, not too little memory
    "static tls": _Text(None),
    "out of memory": _Text("out of memory", of_damaged_files=True),  # CUDA, cairo
    "allocate memory": _Text("out of memory", of_damaged_files=True),  # "can't" in torch, "Cannot" in the C library
    "insufficient memory": _Text("out of memory", of_damaged_files=True),  # OpenCV, libjpeg
    "not enough memory": _Text("out of memory", of_damaged_files=True),  # torch on Windows
    "failed to allocate": _Text("out of memory", of_damaged_files=True),
    "bad_alloc": _Text("out of memory"),  # C++
    "bad allocation": _Text("out of memory"),  # C++ on Windows
    "failed to map segment": _Text("out of memory"),  # the loader of libraries
    "can't start new thread": _Text("out of threads"),  # Python
    "resource temporarily unavailable": _Text("out of threads"),  # C++
}
"""Texts of libraries that raise RuntimeError or an error of their own, in lower case. The first that matches counts."""


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
    found = next((meaning for part, meaning in _TEXTS.items() if part in text), None)
    return None if found is None or (decoding and found.of_damaged_files) else found.what
