"""The task of one slide: how it is tried, tried again, and what its states are called."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows.privacy import Said
from pipeline.batch.queue import failure
from pipeline.errors import Cancelled, LockedError, is_transient
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from wsi.errors import WsiSegmentError

STATES = {"done": "Done", "skipped": "Skipped", "no tissue": "No tissue", "failed": "Failed"}
"""Names of the states that a slide's task ends in. Of two more the slide comes up again later: "Locked", where another
run is at work on it, and "Put off", where what stopped it can pass.
"""


@dataclass(frozen=True)
class Attempt:
    """How one try at a slide ended."""

    result: SlideResult = field(repr=False)
    """Prefect logs the rest of what a failed task gives; here are paths."""
    transient: bool = False
    """Whether another try can help, and there is one."""
    locked: bool = False
    """Whether another run is at work on it."""


@task(
    name="segment-slide",
    task_run_name="{job.path.name}",
    # What is done already stands in the results, not with Prefect.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def segment_one(job: SlideJob, segment: Callable[[], SlideResult], said: Said, *, last: bool) -> State[Attempt]:
    """Segment a slide and name the state after what became of it. `last`: whether there is no other try.

    Prefect's own retries are of no use: a task that waits for its next try is one that runs, and holds up others.
    """
    log, start = get_run_logger(), time.perf_counter()
    try:
        result = segment()
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the other slides go on
        result = SlideResult(job.path.stem, "failed", time.perf_counter() - start, error=failure(job, error))
        if isinstance(error, LockedError):
            return Completed(name="Locked", message=said(result.error), data=Attempt(result, locked=True))
        if not isinstance(error, WsiSegmentError):
            log.error("%s", said("".join(traceback.format_exception(error))))
        if is_transient(error) and not last:
            return Completed(name="Put off", message=said(result.error), data=Attempt(result, transient=True))
        return Failed(message=said(result.error), data=Attempt(result))
    areas = ", ".join(f"{name} {area:.2f} mm²" for name, area in result.areas_mm2.items())
    return Completed(name=STATES[result.status], message=areas or None, data=Attempt(result))
