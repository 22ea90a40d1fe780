"""Runs the blocks of one slide on Dask's threads, a bounded number at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import dask

Item = TypeVar("Item")


def run_all(function: Callable[[Item], None], items: Iterable[Item], in_flight: int, stop: threading.Event) -> None:
    """Call `function` on every item, at most `in_flight` at a time; the items are all that the graph holds.

    The first error ends the run: `stop` is set, which the function should look at now and then, no new item is begun,
    and the error is raised once the running ones have ended. The same holds for KeyboardInterrupt.
    """
    with ThreadPoolExecutor(in_flight, thread_name_prefix="block") as pool:
        tasks = [dask.delayed(function, pure=False)(item) for item in items]
        try:
            # Dask's threaded scheduler keeps as many tasks running as the pool has threads.
            dask.compute(*tasks, scheduler="threads", pool=pool)
        except BaseException:
            stop.set()
            raise
