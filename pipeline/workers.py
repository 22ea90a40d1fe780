"""Where slides are segmented: in this process, in processes of its own, or on a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from models.bundle import load_bundle
from models.predictor import Predictor
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled, ConfigError
from pipeline.report import SlideResult
from pipeline.segment import PlannedSlide, Progress, plan_slide, segment_slide

if TYPE_CHECKING:
    from pipeline.batch import SlideJob

Spread = Literal["slides", "blocks"]
"""What a process is given at a time: a whole slide, or a band of blocks of one."""


class Workers(Protocol):
    """Something that segments slides."""

    @property
    def slides_at_once(self) -> int:
        """How many calls of `segment` keep it busy; a cluster's number changes with its size."""
        ...

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """Segment a slide into `output/<stem>` and return when it has ended. Threads may call it at the same time.

        Raises SlideError, ModelError or PipelineError, as `segment_slide` does; `is_transient` tells whether the same
        call can succeed later.
        """
        ...

    def cancel(self) -> None:
        """Let all calls of `segment`, running ones and later ones, raise Cancelled as soon as they can."""
        ...


@contextmanager
def open_workers(
    scheduler: str | None,
    model: str,
    config: SegmentConfig,
    *,
    spread: Spread = "slides",
    slide_timeout_s: float | None = None,
    first: SlideJob | None = None,
) -> Iterator[Workers]:
    """Give what segments slides with these settings, and with this model where a job names no other. `first`, the job
    that will come first, is planned while this process loads the model.

    `scheduler` is None for this process; "local" for processes of our own, one per GPU or a single one, or "local:N"
    for N; else an address (tcp://…, tls://…) or a scheduler file of a dask.distributed cluster. Results are the same
    bytes wherever they are made, on CPUs as long as the networks have the same number of threads (OMP_NUM_THREADS).

    A slide that takes longer than `slide_timeout_s` fails with SlideTimeoutError and its process is ended; within this
    process that cannot be done.

    Raises ConfigError for settings that cannot be used, ModelError for a model that cannot, ClusterError for a cluster
    that is not to be reached or lacks something.
    """
    if slide_timeout_s is not None and not slide_timeout_s > 0:
        raise ConfigError(f"--slide-timeout is {slide_timeout_s}; it must be a positive number of seconds")
    if scheduler is None:
        _check_in_process(spread, slide_timeout_s)
        here = InProcess(lambda name: load_predictor(name, config), model, config)
        with here.planning(first) if first is not None else nullcontext():
            here.load(model)
            yield here
        return
    from pipeline.cluster.cluster import open_cluster

    with open_cluster(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s) as cluster:
        yield cluster


def load_predictor(model: str, config: SegmentConfig) -> Predictor:
    """A bundle's networks on the device and with the settings of a run. Raises ModelError."""
    return Predictor.from_bundle(load_bundle(model), **predictor_settings(config))


def predictor_settings(config: SegmentConfig) -> dict[str, Any]:
    """Those settings of a run that its networks are made with, as the predictor calls them."""
    return {
        "device": config.device,
        "precision": config.precision,
        "runtime": config.runtime,
        "batch_size": config.batch_size,
        "output_stride": config.output_stride,
        "ungated_fallback": config.keep_ungated,
    }


def config_of(job: SlideJob, config: SegmentConfig) -> SegmentConfig:
    """The settings of one slide: its own mpp wins."""
    return config if job.mpp is None else replace(config, mpp=job.mpp)


class InProcess:
    """Segments one slide at a time in this process; a model is loaded once."""

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
        """The networks of a bundle; raises ModelError where they cannot be used."""
        with self._lock:
            if model not in self._predictors:
                self._predictors[model] = self._load(model)
            return self._predictors[model]

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        def unless_cancelled(stage: str, done: int, total: int) -> None:
            if self._cancelled.is_set():
                raise Cancelled(f"{job.path.name}: stopped; run the same command again to go on")
            progress(stage, done, total)

        config, predictor = config_of(job, self._config), self.load(job.model or self._model)
        with ExitStack() as stack:
            planned = None
            if job in self._planned:
                planned = self._planned.pop(job).result()
                stack.enter_context(planned.slide)
            return segment_slide(job.path, output, predictor, config, unless_cancelled, planned)

    def cancel(self) -> None:
        self._cancelled.set()

    @contextmanager
    def planning(self, job: SlideJob) -> Iterator[None]:
        """Plan a slide on another thread; what is wrong with it is raised by its `segment`."""

        def plan() -> PlannedSlide:
            return plan_slide(job.path, load_bundle(job.model or self._model).card, config_of(job, self._config))

        with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
            self._planned[job] = pool.submit(plan)
            try:
                yield
            finally:
                if (unused := self._planned.pop(job, None)) and not unused.exception():
                    unused.result().slide.close()


def _check_in_process(spread: Spread, slide_timeout_s: float | None) -> None:
    # A thread cannot be ended from outside.
    if slide_timeout_s is not None:
        raise ConfigError("--slide-timeout needs processes that can be ended; pass --scheduler local with it")
    if spread != "slides":
        raise ConfigError(f"--spread {spread} needs several processes; pass --scheduler with it")
