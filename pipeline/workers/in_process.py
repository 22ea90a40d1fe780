"""Slides segmented in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from models.bundle import load_bundle
from models.predictor import Predictor
from models.runtimes import STREAMS
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled
from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult
from pipeline.slide.plan import PlannedSlide, plan_slide
from pipeline.slide.recipe import segment_slide
from pipeline.workers.base import SlideJob, job_config
from pipeline.workers.malloc import keep_freed_memory


def load_predictor(model: str, config: SegmentConfig) -> Predictor:
    """Return the networks of a bundle, on the device and with the settings of a run. Raises ModelError."""
    return Predictor.from_bundle(load_bundle(model, config.model_digest), **predictor_settings(config))


def predictor_settings(config: SegmentConfig) -> dict[str, Any]:
    """Return the settings that a predictor is made with, by the names of `Predictor.from_networks`."""
    return {
        "device": config.device,
        "precision": config.precision,
        "runtime": config.runtime,
        "batch_size": config.batch_size,
        "streams": STREAMS,
        "output_stride": config.output_stride,
        "ungated_fallback": config.keep_ungated,
    }


@contextmanager
def open_in_process(model: str, config: SegmentConfig, *, first: SlideJob | None = None) -> Iterator[InProcess]:
    """Load a model and yield the workers that segment slides with it in this process.

    The slide `first` is planned while the model loads. Raises ModelError.
    """
    workers = InProcess(lambda name: load_predictor(name, config), model, config)
    with workers.planning(first) if first is not None else nullcontext():
        keep_freed_memory(workers.load(model).runtime)
        yield workers


class InProcess:
    """Segments one slide at a time in this process and loads each model once."""

    slides_at_once = 1

    def __init__(self, load: Callable[[str], Predictor], model: str, config: SegmentConfig) -> None:
        self._load = load
        self._model = model
        self._config = config
        self._predictors: dict[str, Predictor] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._planned: dict[SlideJob, Future[PlannedSlide]] = {}

    def load(self, model: str) -> Predictor:
        """Return the networks of a bundle. Raises ModelError."""
        with self._lock:
            if model not in self._predictors:
                self._predictors[model] = self._load(model)
            return self._predictors[model]

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """See `Workers.segment`."""

        def unless_cancelled(stage: str, done: int, total: int) -> None:
            if self._cancelled.is_set():
                raise Cancelled(f"{job.path.name}: cancelled; run the same command again to resume")
            progress(stage, done, total)

        config, predictor = job_config(job, self._config), self.load(job.model or self._model)
        with ExitStack() as stack:
            planned = None
            if job in self._planned:
                planned = self._planned.pop(job).result()
                stack.enter_context(planned.slide)
            return segment_slide(job.path, output, predictor, config, unless_cancelled, planned, job.name)

    def cancel(self) -> None:
        """See `Workers.cancel`."""
        self._cancelled.set()

    @contextmanager
    def planning(self, job: SlideJob) -> Iterator[None]:
        """Plan a slide on another thread. If the plan fails, `segment` raises the error."""

        def plan() -> PlannedSlide:
            return plan_slide(job.path, load_bundle(job.model or self._model).card, job_config(job, self._config))

        with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
            self._planned[job] = pool.submit(plan)
            try:
                yield
            finally:
                if (unused := self._planned.pop(job, None)) and not unused.exception():
                    unused.result().slide.close()
