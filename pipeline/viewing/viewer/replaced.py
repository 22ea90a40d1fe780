"""Refuse requests for a result that was replaced after it was loaded: its files no longer match the loaded record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.exceptions import HTTPException

from pipeline.viewing.viewer.results import Result, record_stamp


def check_current(result: Result) -> None:
    """Raise HTTPException 409 unless the result's folder still has the record that was loaded."""
    if record_stamp(result.folder) != result.stamp:
        raise HTTPException(409, "The result has changed; stop wsi-view and start it again.")


@contextmanager
def current(result: Result) -> Iterator[None]:
    """Call `check_current` before and after the block. Its error replaces an error of the block."""
    check_current(result)
    try:
        yield
    finally:
        check_current(result)
