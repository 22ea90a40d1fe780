"""The task of one slide: how it is tried, tried again, and what its states are called."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows.privacy import Said
from models.errors import ModelError
from pipeline.batch import SlideJob, failure
from pipeline.errors import Cancelled, LockedError, PipelineError, is_transient
from pipeline.report import SlideResult
from wsi.errors import SlideError

RETRY_DELAYS_S = (30.0, 120.0, 600.0)
"""Before the further tries of a slide that a stale mount or a lost worker has stopped."""

STATES = {"done": "Done", "skipped": "Skipped", "no tissue": "No tissue", "failed": "Failed"}
"""Names of the states that a slide's task ends in. One more is "Locked": the slide comes up again later."""


@dataclass(frozen=True)
class Ended:
    """How one try at a slide ended."""

    result: SlideResult
    transient: bool = False
    """Whether another try can help."""
    locked: bool = False
    """Whether another run is at work on it."""


def _helps(_task: Any, _run: Any, state: State[Any]) -> bool:
    return isinstance(state.data, Ended) and state.data.transient


@task(
    name="segment-slide",
    task_run_name="{job.path.name}",
    retries=len(RETRY_DELAYS_S),
    retry_delay_seconds=list(RETRY_DELAYS_S),
    retry_condition_fn=_helps,
    # What is done already stands in the results, not with Prefect.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def segment_one(job: SlideJob, segment: Callable[[], SlideResult], said: Said) -> State[Ended]:
    """Segment a slide and name the state after what became of it; only a failure that can pass is tried again."""
    log, start = get_run_logger(), time.perf_counter()
    try:
        result = segment()
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the other slides go on
        result = SlideResult(job.path.stem, "failed", time.perf_counter() - start, error=failure(job, error))
        if isinstance(error, LockedError):
            return Completed(name="Locked", message=said(result.error), data=Ended(result, locked=True))
        if not isinstance(error, (SlideError, ModelError, PipelineError)):
            log.error("%s", said("".join(traceback.format_exception(error))))
        return Failed(message=said(result.error), data=Ended(result, transient=is_transient(error)))
    areas = ", ".join(f"{name} {area:.2f} mm²" for name, area in result.areas_mm2.items())
    return Completed(name=STATES[result.status], message=areas or None, data=Ended(result))
