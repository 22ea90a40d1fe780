"""How the slides of a batch are doing, kept where people look: summary.csv and Prefect's progress bar."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flows.artifacts import SlideProgress
from pipeline.errors import OutputError
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary

log = logging.getLogger(__name__)

WRITING_SHARE = 0.05
"""Of the time goes into rewriting summary.csv, at most: with ten thousand slides it takes a while."""


class Board:
    """The results of a batch so far. Used by the flow's own thread."""

    def __init__(self, output: Path, progress: SlideProgress) -> None:
        self.results: list[SlideResult] = []
        self.progress = progress
        self._output = output
        self._unwritten: list[SlideResult] = []
        self._due = 0.0

    def ended(self, result: SlideResult) -> None:
        """Add a slide that needs no more work."""
        self.results.append(result)
        self._unwritten.append(result)
        self.progress.ended(result.slide)
        self.show()

    def show(self) -> None:
        """Bring both up to date, unless that was done a moment ago."""
        self.progress.show()
        if self._unwritten and time.monotonic() >= self._due:
            self._write()

    def close(self) -> None:
        """Bring both up to date."""
        self.progress.show(now=True)
        if self._unwritten:
            self._write()

    def _write(self) -> None:
        start = time.monotonic()
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            write_summary(self._output, self._unwritten)
        except OSError as error:
            log.error("%s: cannot write summary.csv: %s", self._output, error.strerror or error)
        except OutputError as error:
            log.error("%s", error)
        self._unwritten.clear()
        end = time.monotonic()
        self._due = end + (end - start) / WRITING_SHARE
