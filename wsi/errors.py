"""Errors of the slide layer.

SlideError
├── SlideNotFoundError   no such file
├── SlideFormatError     no reader can open the file
├── SlideReadError       the file opens, its pixels cannot be read
└── ResolutionError      the micrometres per pixel are unknown, or do not fit the model

Every message begins with the file's name and ends with what to do next.
"""

from __future__ import annotations


class SlideError(Exception):
    """Base of everything that is wrong with one slide."""


class SlideNotFoundError(SlideError):
    """No such file."""


class SlideFormatError(SlideError):
    """No reader can open the file."""


class SlideReadError(SlideError):
    """The file opens, but its pixels cannot be read."""


class ResolutionError(SlideError):
    """The micrometres per pixel are unknown, or do not fit the model."""
