"""The states that flow runs end in."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import State
from prefect.states import Completed, Failed

from pipeline.batch.tally import new_failures, slide_count, tally
from pipeline.results.slide_result import SlideResult


def end_state(results: Sequence[SlideResult]) -> State[None]:
    """Return `Completed` if no slide failed in this run, else a failed state named after the number of failures."""
    failed = new_failures(results)
    if failed:
        return Failed(name=f"{failed} of {slide_count(len(results))} failed", message=tally(results))
    return Completed(message=tally(results))
