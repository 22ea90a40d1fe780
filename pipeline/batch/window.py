"""The window of slides in flight: which slide is attempted next, and when.

Nothing here starts a thread or reads a clock: both belong to the `Slots`, so that a simulation can replace them.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.batch.attempt import Attempt
from pipeline.workers.base import SlideJob

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (30.0, 120.0, 600.0)
"""Delays before the second, third and fourth attempt at a slide after transient failures."""

LOOK_S = 1.0
"""Interval in which locked slides are examined and progress is shown."""

LOCK_CHECKS = 32
"""Locked slides examined per interval: each check opens a file, and two runs may share thousands of slides."""


@dataclass(order=True)
class QueuedSlide:
    """A slide without a final result. Ordered by the time of its next attempt, then by its place in the batch."""

    due: float
    """The next attempt starts no earlier than this time of the slots' clock."""
    number: int
    job: SlideJob = field(compare=False)
    retries: int = field(default=0, compare=False)
    """Transient failures so far."""
    locked_until: float | None = field(default=None, compare=False)
    """None until another run had the slide's lock; then the time from which the lock is an error."""
    stamp: str | None = field(default=None, compare=False)
    """Stamp of the slide's file before the last attempt."""

    lock_is_final: bool = field(default=False, compare=False)
    """Whether the slide fails if the next attempt finds it locked."""

    def settle(self, attempt: Attempt) -> Attempt:
        """Return the attempt, as a final one if the slide is not attempted again."""
        retries_used_up = attempt.end == "transient" and self.retries >= len(RETRY_DELAYS_S)
        if retries_used_up or (attempt.end == "locked" and self.lock_is_final):
            return replace(attempt, end="final")
        return attempt


class Slots(Protocol):
    """Runs attempts and has the clock."""

    def now(self) -> float:
        """Return the time in seconds."""
        ...

    def start(self, slide: QueuedSlide) -> None:
        """Begin an attempt."""
        ...

    def wait(self, timeout_s: float) -> tuple[QueuedSlide, Attempt] | None:
        """Return the next attempt that ends, None after `timeout_s`. Raises what the attempt raised."""
        ...


class SlideQueue:
    """Keeps as many slides in flight as there are workers, until every slide has a final attempt.

    - A slide that failed transiently waits `RETRY_DELAYS_S` and then comes first. While it waits it holds no slot.
    - A slide that another run has locked waits until a slot is free, no other slide is ready, and its lock is gone.
      If the lock stays for longer than `lock_timeout_s`, the next attempt is final.
    """

    def __init__(
        self,
        slides: Iterable[QueuedSlide],
        slots: Slots,
        at_once: Callable[[], int],
        is_locked: Callable[[SlideJob], bool],
        lock_timeout_s: float = math.inf,
    ) -> None:
        """`at_once` is called before each attempt, because the number of workers may change."""
        self._ready = deque(slides)
        self._delayed: list[QueuedSlide] = []
        self._locked: deque[QueuedSlide] = deque()
        self._locks_due = -math.inf
        self._running = 0
        self._slots = slots
        self._at_once = at_once
        self._is_locked = is_locked
        self._lock_timeout_s = lock_timeout_s

    def __iter__(self) -> Iterator[tuple[QueuedSlide, Attempt] | None]:
        """Yield each slide with its final attempt, as they end; None at least once per `LOOK_S` without such an end."""
        while self._ready or self._delayed or self._locked or self._running:
            self._fill()
            ended = self._slots.wait(self._wait_s())
            if ended is not None:
                self._running -= 1
                self._queue_again(*ended)
            yield ended if ended is not None and ended[1].end == "final" else None

    def _fill(self) -> None:
        while self._running < max(1, self._at_once()):
            slide = self._next()
            if slide is None:
                return
            self._slots.start(slide)
            self._running += 1

    def _next(self) -> QueuedSlide | None:
        if self._delayed and self._delayed[0].due <= self._slots.now():
            return heapq.heappop(self._delayed)
        return self._ready.popleft() if self._ready else self._next_unlocked()

    def _next_unlocked(self) -> QueuedSlide | None:
        now = self._slots.now()
        if now < self._locks_due:
            return None
        for _ in range(min(len(self._locked), LOCK_CHECKS)):
            slide = self._locked.popleft()
            slide.lock_is_final = slide.locked_until is not None and now >= slide.locked_until
            if now >= slide.due and (slide.lock_is_final or not self._is_locked(slide.job)):
                return slide
            self._locked.append(slide)
        self._locks_due = now + LOOK_S
        return None

    def _queue_again(self, slide: QueuedSlide, attempt: Attempt) -> None:
        now = self._slots.now()
        if attempt.end == "transient":
            delay_s = RETRY_DELAYS_S[slide.retries]
            log.warning("%s; retrying in %.0f s", attempt.result.error, delay_s)
            slide.retries, slide.due = slide.retries + 1, now + delay_s
            heapq.heappush(self._delayed, slide)
        elif attempt.end == "locked":
            if slide.locked_until is None:
                log.warning("%s: another run is working on this slide; waiting for it", slide.job.result_name)
                slide.locked_until = now + self._lock_timeout_s
            slide.due = now + LOOK_S
            self._locked.append(slide)

    def _wait_s(self) -> float:
        """Return the time until something other than the end of an attempt needs attention."""
        next_s = self._delayed[0].due - self._slots.now() if self._delayed else LOOK_S
        # A slide that is due already waits for a slot, which becomes free when an attempt ends.
        return min(LOOK_S, next_s) if next_s > 0 else LOOK_S
