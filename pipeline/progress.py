"""The callback through which every long job reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done, and all steps."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore the progress."""
