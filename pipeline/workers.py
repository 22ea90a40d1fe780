"""Where slides are segmented: in this process, in processes of its own, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError
from pipeline.malloc import keep_freed_memory
from pipeline.report import SlideResult

# Nothing here imports torch: a process that only waits for others does not need it.
if TYPE_CHECKING:
    from pipeline.batch import SlideJob
    from pipeline.segment import Progress

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
    that will come first, is planned while the model is loaded for it.

    `scheduler` is None for this process; "process" for another one, so that a crash does not end this one; "local" for
    one per GPU, or a single one, or "local:N" for N; else an address (tcp://…, tls://…) or a scheduler file of a
    dask.distributed cluster. Results are the same bytes wherever they are made, on CPUs as long as the networks have
    the same number of threads (OMP_NUM_THREADS).

    A slide that takes longer than `slide_timeout_s` fails with SlideTimeoutError and its process is ended; within this
    process that cannot be done.

    Raises ConfigError for settings that cannot be used, ModelError for a model that cannot, ClusterError for a cluster
    that is not to be reached or lacks something.
    """
    if slide_timeout_s is not None and not slide_timeout_s > 0:
        raise ConfigError(f"--slide-timeout is {slide_timeout_s}; it must be a positive number of seconds")
    if scheduler is None:
        _check_in_process(spread, slide_timeout_s)
        from pipeline.in_process import InProcess, load_predictor

        here = InProcess(lambda name: load_predictor(name, config), model, config)
        with here.planning(first) if first is not None else nullcontext():
            keep_freed_memory(here.load(model).runtime)
            yield here
        return
    if scheduler == "process":
        _check_slides(spread)
        from pipeline.slide_process import SlideProcess

        with closing(SlideProcess(model, config, slide_timeout_s=slide_timeout_s, first=first)) as process:
            yield process
        return
    from pipeline.cluster.cluster import open_cluster

    with open_cluster(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s) as cluster:
        yield cluster


def config_of(job: SlideJob, config: SegmentConfig) -> SegmentConfig:
    """The settings of one slide: its own mpp wins."""
    return config if job.mpp is None else replace(config, mpp=job.mpp)


def _check_in_process(spread: Spread, slide_timeout_s: float | None) -> None:
    # A thread cannot be ended from outside.
    if slide_timeout_s is not None:
        raise ConfigError("--slide-timeout needs processes that can be ended; pass --scheduler local with it")
    _check_slides(spread)


def _check_slides(spread: Spread) -> None:
    if spread != "slides":
        raise ConfigError(f"--spread {spread} needs several processes; pass --scheduler local:N with it")
