"""Where attempts run: on threads, or on the calling thread."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pipeline.batch.attempt import Attempt
from pipeline.batch.window import QueuedSlide

MAX_THREADS = 1000
"""Slides in flight at most: each has a thread that waits for it, which takes about 20 KB of memory."""


class ThreadSlots:
    """Runs each attempt on a thread of its own. Context manager; leaving it waits for the running attempts."""

    def __init__(self, run: Callable[[QueuedSlide], Attempt]) -> None:
        self._run = run
        # The pool starts a thread only if no other one is idle, so it is as large as the window has ever been.
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="slide")
        self._ended: queue.SimpleQueue[tuple[QueuedSlide, Future[Attempt]]] = queue.SimpleQueue()

    def now(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def start(self, slide: QueuedSlide) -> None:
        """Begin an attempt."""
        future = self._pool.submit(self._run, slide)
        future.add_done_callback(lambda done: self._ended.put((slide, done)))

    def wait(self, timeout_s: float) -> tuple[QueuedSlide, Attempt] | None:
        """Return the next attempt that ends, None after `timeout_s`. Raises what the attempt raised."""
        try:
            slide, future = self._ended.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return slide, future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


class CallingThread:
    """Runs one attempt at a time on the calling thread, where a KeyboardInterrupt reaches the slide itself."""

    def __init__(self, run: Callable[[QueuedSlide], Attempt]) -> None:
        self._run = run
        self._ended: deque[tuple[QueuedSlide, Attempt]] = deque()

    def now(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def start(self, slide: QueuedSlide) -> None:
        """Make an attempt."""
        self._ended.append((slide, self._run(slide)))

    def wait(self, timeout_s: float) -> tuple[QueuedSlide, Attempt] | None:
        """Return the attempt that was made; None after `timeout_s` if there is none."""
        if not self._ended:
            time.sleep(timeout_s)
            return None
        return self._ended.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
