"""Processes of our own on this machine: one per GPU, or as many as asked for."""

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

from pipeline.errors import ClusterError
from pipeline.workers.semaphores import start_silent_tracker

log = logging.getLogger(__name__)

MALLOC = {"MALLOC_TRIM_THRESHOLD_": 256 << 20, "MALLOC_MMAP_THRESHOLD_": 256 << 20}
"""Set before a process starts. The nanny's own threshold of 64 KiB makes the code of tiles three times slower."""

END_S = 0.5
"""How long a process may take to end by itself before it is killed."""

ALLOWED_FAILURES = 2
"""A task that has killed more processes than this fails: one may die of something else, or be in the killer's way."""


@contextmanager
def own_processes(count: int, gpus: list[str]) -> Iterator[SpecCluster]:
    """Start `count` worker processes; the i-th sees only the GPU `gpus[i % len(gpus)]`, if there are any.

    They listen on this machine alone, take orders only from this process (by certificates made for the moment), end
    with it however it ends, and leave Ctrl-C to it. The cores are shared out among them, unless OMP_NUM_THREADS says
    otherwise: on a CPU the last bit of a network's output depends on its number of threads.
    """
    start_silent_tracker()
    security = Security.temporary()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    common: dict[str, Any] = {
        "nthreads": 1,
        "host": "127.0.0.1",
        "protocol": "tls://",
        "security": security,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
        # The plan of each slide is held against the memory that there is; killing at a share of it would come too soon.
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
        "distributed.comm.timeouts.connect": "120s",  # for a machine that is busy with something else
    }
    with dask.config.set(settings):
        try:
            cluster = SpecCluster(
                workers=workers,
                scheduler=scheduler,
                security=security,
                silence_logs=logging.CRITICAL,
                name="own processes",
            )
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"{count} processes of our own cannot be started: {error}") from error
    try:
        yield cluster
    finally:
        try:
            cluster.sync(_end, cluster)
            cluster.close(timeout=60)
        except TimeoutError:
            # On a machine that is busy with something else. What was done is on the disk, and they end with this one.
            log.warning("the processes of our own have not ended within a minute; they will with this one")


async def _end(cluster: SpecCluster) -> None:
    # Whatever the processes are doing: what they have finished is on the disk.
    await asyncio.gather(*(nanny.close(timeout=END_S) for nanny in cluster.workers.values()))


def process_count(text: str, gpus: list[str]) -> int:
    """How many processes "local" or "local:N" stands for. Raises ValueError where N is no positive number.

    Without a GPU "local" is one process, whose networks use all cores and so give the same bytes as in this process.
    """
    _, _, number = text.partition(":")
    if number:
        count = int(number)
        if count < 1:
            raise ValueError(number)
        return count
    return len(gpus) or 1


def visible_gpus(device: str) -> list[str]:
    """The GPUs to spread processes over, as CUDA_VISIBLE_DEVICES names them; none for a device that is named."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


class _Nanny(Nanny):
    """A nanny whose processes do not get the terminal's Ctrl-C."""

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
