"""The plan of a run's first slide, made while its model loads.

Nothing here imports torch, so the plan begins before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from models.bundle import load_bundle
from pipeline.config import SegmentConfig
from pipeline.slide.plan import PlannedSlide, plan_slide
from pipeline.workers.base import SlideJob, job_config
from pipeline.workers.malloc import return_arrays_to_the_kernel

Plans = dict[SlideJob, Future[PlannedSlide]]
"""Plans of slides that are not segmented yet. Whoever takes one out closes its slide."""


@contextmanager
def planning(model: str, config: SegmentConfig, job: SlideJob | None) -> Iterator[Plans]:
    """Plan the slide of `job` on another thread, and yield the future of its plan.

    If the plan fails, the future raises the error. If `job` is None, the dictionary is empty. `model` and `config` are
    those of the run. Call `keep_freed_memory` when the model is loaded, because arrays return to the kernel until then.
    """
    if job is None:
        yield {}
        return

    def plan() -> PlannedSlide:
        return plan_slide(job.path, load_bundle(job.model or model).card, job_config(job, config))

    return_arrays_to_the_kernel()
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        plans: Plans = {job: pool.submit(plan)}
        try:
            yield plans
        finally:
            if (unused := plans.pop(job, None)) and not unused.exception():
                unused.result().slide.close()
