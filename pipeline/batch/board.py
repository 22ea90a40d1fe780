"""The table `summary.csv` of a running batch, rewritten now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import OutputError
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import is_folder, write_summary

log = logging.getLogger(__name__)

WRITING_SHARE = 0.05
"""Largest share of the time that goes into rewriting `summary.csv`; with 10,000 slides one rewrite takes a while."""

RETRY_S = 60.0
"""Seconds until the next write after one that failed."""

WAIT_S = 3.0
"""Seconds to wait for another process that writes the table. The batch stands still meanwhile."""

LAST_WAIT_S = 60.0
"""The same at the end of the batch."""


class Board:
    """Collects results and writes them to `summary.csv`.

    A file that cannot be written is logged, not raised. The next write contains the rows.
    """

    def __init__(self, output: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._unwritten: list[SlideResult] = []
        self._folders: list[SlideResult] = []
        self._failed = False
        self._due = -float("inf")

    def add(self, result: SlideResult) -> None:
        """Add a result; write the table if it is due."""
        # Every write drops the rows of folders, which could be searched this time.
        (self._folders if is_folder(result.slide) else self._unwritten).append(result)
        self.refresh()

    def refresh(self) -> None:
        """Write the results since the last time, unless the table was written a moment ago."""
        if self._clock() >= self._due:
            self.write()

    def close(self) -> str:
        """Write the results since the last time. Return what is missing from the table for good, or an empty text."""
        self.write()
        if self._unwritten or self._failed:
            log.warning("%s: trying once more to write summary.csv, for up to %g s", self._output, LAST_WAIT_S)
            self.write(LAST_WAIT_S)
        missing = len(self._unwritten) + (len(self._folders) if self._failed else 0)
        if not missing:
            return ""
        rows = f"{missing} row{'s' if missing > 1 else ''}"
        return (
            f"{self._output}: {rows} of this run could not be written to summary.csv; the results themselves are "
            f"complete: repair the cause, and run the same command again to write the rows"
        )

    def write(self, wait_s: float = WAIT_S) -> None:
        """Write the results since the last time. Wait at most `wait_s` seconds for another process that writes."""
        if not self._unwritten and not self._folders:
            return
        start, pause_s, self._failed = self._clock(), RETRY_S, True
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            write_summary(self._output, [*self._unwritten, *self._folders], wait_s)
            self._unwritten.clear()
            self._failed = False
            pause_s = (self._clock() - start) / WRITING_SHARE
        except OSError as error:
            log.error("%s: cannot write summary.csv: %s", self._output, error.strerror or error)
        except OutputError as error:
            log.error("%s", error)
        self._due = self._clock() + pause_s
