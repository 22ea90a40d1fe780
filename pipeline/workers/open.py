"""Open workers: in this process, in a child process, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError

# Nothing here imports torch, because a process that waits for others does not need it.
from pipeline.workers.base import SlideJob, Spread, Workers
from pipeline.workers.malloc import imported_for_good


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
    """Yield workers that segment slides with these settings, and with this model unless a job names another one.

    The job `first` is planned while its model loads.

    `scheduler` is None for this process; "process" for a child process, so that a crash does not end this one; "local"
    for one process per GPU, or one if there is no GPU; "local:N" for N processes; or the address (tcp://…, tls://…) or
    the scheduler file of a dask.distributed cluster. All of them write the same bytes if they compute in the same way
    (`ResolvedSettings.computed_with`).

    A slide that takes longer than `slide_timeout_s` fails with SlideTimeoutError, and its process is killed. A timeout
    is not possible in this process.

    Raises ConfigError if the settings cannot be used, ModelError if the model cannot be used, and ClusterError if the
    cluster is unreachable or cannot run the job.
    """
    if slide_timeout_s is not None and not slide_timeout_s > 0:
        raise ConfigError(f"--slide-timeout is {slide_timeout_s}; it must be a positive number of seconds")
    if scheduler is None:
        _check_in_process(spread, slide_timeout_s)
        with imported_for_good():
            from pipeline.workers.in_process import open_in_process

        with open_in_process(model, config, first=first) as here:
            yield here
        return
    if scheduler == "process":
        _check_slides(spread)
        from pipeline.workers.child_process import ChildProcess

        with closing(ChildProcess(model, config, slide_timeout_s=slide_timeout_s, first=first)) as process:
            yield process
        return
    from pipeline.workers.cluster.cluster import open_cluster

    with open_cluster(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s) as cluster:
        yield cluster


def _check_in_process(spread: Spread, slide_timeout_s: float | None) -> None:
    # A thread cannot be killed.
    if slide_timeout_s is not None:
        raise ConfigError("--slide-timeout needs processes that can be killed; add --scheduler local")
    _check_slides(spread)


def _check_slides(spread: Spread) -> None:
    if spread != "slides":
        raise ConfigError(f"--spread {spread} needs several processes; add --scheduler local:N")
