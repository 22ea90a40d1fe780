"""Flow runs that share the attempts of a batch between them, so that Prefect's history stays bounded.

Prefect keeps the states of all tasks of a flow run in memory until the run ends. A batch of more than `PART` slides
therefore has a sub-flow run for every `PART` attempts. The parts do not wait for each other: when a part is full, the
next one takes the following attempts while the last ones of the former part are still running.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from types import TracebackType
from typing import Self

from prefect import State, flow
from prefect.states import Cancelled as CancelledState

from flows.ending import end_state
from flows.privacy import Redact
from flows.slide_task import segment_one
from pipeline.batch.attempt import Attempt
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob

log = logging.getLogger(__name__)

PART = 500
"""Attempts per flow run."""


class PartRuns:
    """Runs attempts as tasks of the flow run that makes this object, or of its parts. Context manager."""

    def __init__(self, slides: int, redact: Redact) -> None:
        """A batch of at most `PART` slides needs no parts, except for attempts beyond the first `PART`."""
        self._redact = redact
        self._flow_context = copy_context()
        self._lock = threading.Lock()
        self._current = _Part(self._flow_context, room=PART if slides <= PART else 0)
        self._runs: list[_PartRun] = []
        self._upcoming: _PartRun | None = None
        self._left = slides

    def attempt(self, job: SlideJob, make: Callable[[], Attempt]) -> Attempt:
        """Make an attempt as a Prefect task. If Prefect cannot run the task, make the attempt without it."""
        made: list[Attempt | BaseException] = []

        def keep() -> Attempt:
            try:
                attempt = make()
            except BaseException as error:
                made.append(error)
                raise
            made.append(attempt)
            return attempt

        part = self._enter()
        try:
            part.context.copy().run(segment_one, job, keep, self._redact, return_state=True)
        except Exception as error:  # noqa: BLE001 - no error of Prefect stops a slide
            if not made:
                log.warning("%s: Prefect could not run its task (%s)", job.path.name, type(error).__name__)
        outcome = made[0] if made else make()
        part.leave(outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _enter(self) -> _Part:
        with self._lock:
            if not self._current.room:
                self._current = self._next_part()
            self._current.enter()
            self._left -= 1
            # A busy server takes up to 20 s to start a flow run. No attempt waits for that.
            if self._upcoming is None and self._current.room <= PART // 2 and self._left > self._current.room:
                self._upcoming = self._start_run()
            return self._current

    def _start_run(self) -> _PartRun:
        self._runs.append(_PartRun(self._flow_context, f"part {len(self._runs) + 1}"))
        return self._runs[-1]

    def _next_part(self) -> _Part:
        run, self._upcoming = self._upcoming or self._start_run(), None
        run.wait_until_started()
        if run.part is None:
            log.warning("Prefect's server does not answer; %d slides run without a part of their own", PART)
            return _Part(self._flow_context, room=PART)
        return run.part

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self._runs:
            run.close(interrupted=error is not None)
        for run in self._runs:
            run.join()


class _Part:
    """Attempts that run in one flow run's context."""

    def __init__(self, context: Context, room: int) -> None:
        self.context = context
        self.room = room
        self.results: list[SlideResult] = []
        self.interrupted = False
        self.ended = threading.Event()
        self._running = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Count an attempt that begins."""
        with self._lock:
            self.room -= 1
            self._running += 1

    def leave(self, outcome: Attempt | BaseException) -> None:
        """Count an attempt that has ended; the last one of a full part ends the part."""
        with self._lock:
            self._running -= 1
            if isinstance(outcome, Attempt) and outcome.end == "final":
                self.results.append(outcome.result)
            if not self.room and not self._running:
                self.ended.set()


class _PartRun:
    """The thread on which a part's flow run waits for its attempts."""

    def __init__(self, flow_context: Context, name: str) -> None:
        """Start the flow run."""
        self.part: _Part | None = None
        self._started = threading.Event()
        self._flow_context = flow_context
        self._thread = threading.Thread(target=self._run, args=(name,), name=name)
        self._thread.start()

    def wait_until_started(self) -> None:
        """Wait until the flow run runs. `part` stays None if Prefect cannot start it."""
        self._started.wait()

    def close(self, *, interrupted: bool) -> None:
        """Let the flow run end although the part is not full."""
        self.wait_until_started()
        if self.part is not None:
            self.part.interrupted = interrupted and not self.part.ended.is_set()
            self.part.ended.set()

    def join(self) -> None:
        """Wait for the end of the flow run."""
        self._thread.join()

    def _run(self, name: str) -> None:
        # No parameters: Prefect would store the path of every slide.
        @flow(name="segment-part", flow_run_name=name)
        def segment_part() -> State[None]:
            part = self.part = _Part(copy_context(), room=PART)
            self._started.set()
            part.ended.wait()
            return CancelledState() if part.interrupted else end_state(part.results)

        try:
            self._flow_context.copy().run(segment_part, return_state=True)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("%s: Prefect's server does not answer (%s); the slides continue", name, type(error).__name__)
        finally:
            self._started.set()
