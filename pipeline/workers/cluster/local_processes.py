"""Worker processes on this machine: one per GPU, or a requested number."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask
from distributed import Nanny, Scheduler, SpecCluster
from distributed.security import Security

from models.runtimes import RUNTIME_FACTS
from pipeline.errors import ClusterError
from pipeline.limits import available_cores
from pipeline.workers.semaphores import start_silent_tracker

log = logging.getLogger(__name__)

_KEPT_BYTES = RUNTIME_FACTS["torch"].kept_bytes
MALLOC = {"MALLOC_TRIM_THRESHOLD_": _KEPT_BYTES, "MALLOC_MMAP_THRESHOLD_": _KEPT_BYTES}
"""Environment of a process. With the nanny's own threshold of 64 KiB, the code of tiles takes three times as long."""

END_S = 0.5
"""Seconds until a process that does not exit is killed."""

ALLOWED_FAILURES = 2
"""A task fails if more processes than this die while they run it. Some die for another reason."""


@contextmanager
def local_processes(count: int, gpus: list[str]) -> Iterator[SpecCluster]:
    """Start `count` worker processes; the i-th sees only the GPU `gpus[i % len(gpus)]`, if there are any.

    The processes listen on this machine only, accept tasks only from this process (by temporary certificates), exit
    with this process, and ignore Ctrl-C. They share the cores equally unless OMP_NUM_THREADS is set.
    """
    start_silent_tracker()
    security = Security.temporary()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // count))
    common: dict[str, Any] = {
        "nthreads": 1,
        "host": "127.0.0.1",
        "protocol": "tls://",
        "security": security,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
        # The plan of each slide is checked against the available memory, so no process is killed at a share of it.
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
    workers = {
        number: {
            "cls": _Nanny,
            "options": common | {"env": _environment(number, gpus, threads), "resources": {"GPU": 1} if gpus else {}},
        }
        for number in range(count)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": "127.0.0.1",
            "port": 0,
            "protocol": "tls://",
            "security": security,
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",
            "allowed_failures": ALLOWED_FAILURES,
        },
    }
    settings = {
        "distributed.nanny.pre-spawn-environ": MALLOC | _threads(threads),
        "distributed.comm.timeouts.connect": "120s",  # for a busy machine
    }
    with dask.config.set(settings):
        try:
            cluster = SpecCluster(
                workers=workers,
                scheduler=scheduler,
                security=security,
                silence_logs=logging.CRITICAL,
                name="local processes",
            )
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"{count} local processes cannot be started: {error}") from error
    try:
        yield cluster
    finally:
        try:
            cluster.sync(_end, cluster)
            cluster.close(timeout=60)
        except TimeoutError:
            # The machine is busy. The finished blocks are on the disk, and the processes exit with this one.
            log.warning("the local processes have not exited within a minute; they exit with this process")


async def _end(cluster: SpecCluster) -> None:
    # The finished blocks are on the disk, so running tasks need not finish.
    async def end(nanny: Nanny) -> None:
        # On a busy machine, a killed process may exit later. The cluster must be closed all the same: otherwise Dask
        # closes it when this process exits, and logs this.
        with suppress(TimeoutError):
            await nanny.close(timeout=END_S)

    await asyncio.gather(*map(end, cluster.workers.values()))


def process_count(text: str, gpus: list[str]) -> int:
    """Return the number of processes for "local" or "local:N".

    Without a GPU, "local" is one process that uses all cores, so its results have the same bytes as in this process.
    """
    _, _, number = text.partition(":")
    return int(number) if number else len(gpus) or 1


def visible_gpus(device: str) -> list[str]:
    """Return the GPUs to use, as in CUDA_VISIBLE_DEVICES; none if the device is named."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


class _Nanny(Nanny):
    """A nanny whose processes ignore the terminal's Ctrl-C."""

    async def instantiate(self) -> Any:
        # A process inherits the blocked signals of the thread that starts it.
        with suppress(AttributeError):  # not on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return await super().instantiate()


def _environment(number: int, gpus: list[str], threads: str) -> dict[str, str]:
    environment = _threads(threads)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment


def _threads(count: str) -> dict[str, str]:
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
