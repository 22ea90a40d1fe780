"""Where slides are segmented: in this process, in processes of its own, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError

# Nothing here imports torch: a process that only waits for others does not need it.
from pipeline.workers.base import SlideJob, Spread, Workers


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
        from pipeline.workers.in_process import open_in_process

        with open_in_process(model, config, first=first) as here:
            yield here
        return
    if scheduler == "process":
        _check_slides(spread)
        from pipeline.workers.child_process import SlideProcess

        with closing(SlideProcess(model, config, slide_timeout_s=slide_timeout_s, first=first)) as process:
            yield process
        return
    from pipeline.workers.cluster.cluster import open_cluster

    with open_cluster(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s) as cluster:
        yield cluster


def _check_in_process(spread: Spread, slide_timeout_s: float | None) -> None:
    # A thread cannot be ended from outside.
    if slide_timeout_s is not None:
        raise ConfigError("--slide-timeout needs processes that can be ended; pass --scheduler local with it")
    _check_slides(spread)


def _check_slides(spread: Spread) -> None:
    if spread != "slides":
        raise ConfigError(f"--spread {spread} needs several processes; pass --scheduler local:N with it")
