"""The task of one attempt at a slide, and the names of the states it ends in."""

from __future__ import annotations

from collections.abc import Callable

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled as CancelledState
from prefect.states import Completed, Failed

from flows.privacy import Redact
from pipeline.batch.attempt import Attempt
from pipeline.errors import Cancelled
from pipeline.workers.base import SlideJob

STATES = {"done": "Done", "skipped": "Skipped", "no tissue": "No tissue", "unrecognized": "Unrecognized"}
"""Names of the states of attempts that did not fail, by the status of the result. After an attempt that ends in
"Locked" (another run is working on the slide) or "Retrying" (transient failure), the batch attempts the slide again.
"""


@task(
    name="segment-slide",
    task_run_name="{job.path.name}",
    # The results folder is the record of what is done, not Prefect.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def segment_one(job: SlideJob, make: Callable[[], Attempt], redact: Redact) -> State[None]:  # noqa: ARG001 - names the run
    """Make one attempt at a slide and name the task's state after its outcome.

    Prefect's own retries are not used: a task that waits for its next retry counts as running and holds a slot.
    """
    try:
        attempt = make()
    except Cancelled:  # `PartRuns` raises it again outside the task
        return CancelledState()
    result = attempt.result
    if attempt.trace:
        get_run_logger().error("%s", redact(attempt.trace))
    if attempt.end != "final":
        return Completed(name="Locked" if attempt.end == "locked" else "Retrying", message=redact(result.error))
    if result.status == "failed":
        return Failed(message=redact(result.error))
    areas = ", ".join(f"{name} {area:.2f} mm²" for name, area in result.areas_mm2.items())
    return Completed(name=STATES[result.status], message=areas or None)
