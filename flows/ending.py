"""The states that flow runs end in."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import State
from prefect.states import Completed, Failed

from pipeline.batch.tally import new_failures, slide_count, tally
from pipeline.results.slide_result import SlideResult


def end_state(results: Sequence[SlideResult], incomplete: str = "") -> State[None]:
    """Return `Completed` if no slide failed in this run, else a failed state named after the number of failures.

    `incomplete` states which rows are missing from summary.csv. They fail the run too, as in wsi-segment.
    """
    failed = new_failures(results)
    message = "\n\n".join(filter(None, (tally(results), incomplete)))
    if failed:
        return Failed(name=f"{failed} of {slide_count(len(results))} failed", message=message)
    if incomplete:
        return Failed(name="summary.csv is incomplete", message=message)
    return Completed(message=message)
