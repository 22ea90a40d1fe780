"""Open workers: in this process, in a child process, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pipeline.config import FEWEST_ALLOWED_PROCESSES, PROCESSES_PER_CORE, SegmentConfig
from pipeline.errors import ConfigError
from pipeline.files import is_file
from pipeline.limits import available_cores

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
    check_workers(scheduler, spread=spread, slide_timeout_s=slide_timeout_s)
    if scheduler is None:
        with imported_for_good():
            from pipeline.workers.in_process import open_in_process

        with open_in_process(model, config, first=first) as here:
            yield here
        return
    if scheduler == "process":
        from pipeline.workers.child_process import ChildProcess

        with closing(ChildProcess(model, config, slide_timeout_s=slide_timeout_s, first=first)) as process:
            yield process
        return
    from pipeline.workers.cluster.cluster import open_cluster

    with open_cluster(scheduler, model, config, spread=spread, slide_timeout_s=slide_timeout_s) as cluster:
        yield cluster


def check_workers(scheduler: str | None, *, spread: Spread = "slides", slide_timeout_s: float | None = None) -> None:
    """Raise ConfigError if `open_workers` refuses these values whatever the model and the slides are.

    It neither starts a process nor connects to a cluster.
    """
    if slide_timeout_s is not None and not slide_timeout_s > 0:
        raise ConfigError(f"--slide-timeout is {slide_timeout_s}; it must be a positive number of seconds")
    if scheduler is None and slide_timeout_s is not None:  # a thread cannot be killed
        raise ConfigError("--slide-timeout needs processes that can be killed; add --scheduler local")
    if scheduler in (None, "process") and spread != "slides":
        raise ConfigError(f"--spread {spread} needs several processes; add --scheduler local:N")
    if scheduler is not None and scheduler != "process":
        _check_scheduler(scheduler)


def _check_scheduler(scheduler: str) -> None:
    kind, colon, number = scheduler.partition(":")
    if kind == "local":
        most = max(FEWEST_ALLOWED_PROCESSES, PROCESSES_PER_CORE * available_cores())
        # Python does not convert thousands of digits.
        if colon and not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= most):
            raise ConfigError(f"--scheduler is {scheduler!r}; N of local:N must be from 1 to {most} on this machine")
    elif "://" not in scheduler and not is_file(Path(scheduler)):
        raise ConfigError(
            f"--scheduler is {scheduler!r}; it must be process, local, local:N, the address of a dask.distributed "
            "cluster (tcp://…, tls://…), or its scheduler file"
        )
