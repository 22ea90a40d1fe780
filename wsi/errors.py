"""Errors about slides, and the base class of every error in this project.

WsiSegmentError              base of every error that this project raises
├── SlideError               a slide cannot be used
│   ├── SlideNotFoundError   the slide file does not exist
│   ├── SlideFormatError     no reader can open the file
│   ├── SlideReadError       the file opens, but its pixels cannot be read
│   └── ResolutionError      the pixel size is unknown, or does not fit the model
├── ModelError               see models/errors.py
└── PipelineError            see pipeline/errors.py

Every message starts with the file name and ends with the next step. This module imports nothing, so that `models` can
import the base class without loading a slide reader.
"""

from __future__ import annotations


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
