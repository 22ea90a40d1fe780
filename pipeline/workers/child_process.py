"""A child process that segments slides, so that the crash of a native reader does not end the batch.

The processes communicate through an unnamed pipe. No port is opened.
"""

from __future__ import annotations

import errno
import logging
import math
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from pipeline.config import SegmentConfig
from pipeline.console import log_to_stderr
from pipeline.errors import (
    SHORTAGE_HELP,
    Cancelled,
    ClusterError,
    PipelineError,
    SlideTimeoutError,
    WorkerCrashedError,
    WorkerLostError,
)
from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob, Workers
from pipeline.workers.malloc import imported_for_good, keep_freed_memory
from pipeline.workers.outcome import Outcome
from pipeline.workers.semaphores import start_silent_tracker
from wsi.errors import WsiSegmentError, shortage

log = logging.getLogger(__name__)

END_S = 10.0
"""Seconds to wait for an exited process."""

_CANNOT_START = "the child process that segments the slides cannot start"

_POLL_S = 3600.0
"""Longest single wait for a message, in seconds: the system call takes 32-bit milliseconds, and cannot take inf."""

_ENDED_FROM_OUTSIDE = {-getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}
"""Exit codes of a process that a person, a batch system or the shutdown of the machine ended: no library sends these
signals, so the slide is not the cause."""


class ChildProcess:
    """Segments one slide at a time in a child process, which is restarted after a crash."""

    slides_at_once = 1

    def __init__(
        self, model: str, config: SegmentConfig, *, slide_timeout_s: float | None = None, first: SlideJob | None = None
    ) -> None:
        """Start the process and wait until its model is loaded. `first`: see `open_workers`.

        Raises ModelError, or ClusterError if the process cannot start.
        """
        self._model = model
        self._config = config
        self._timeout_s = slide_timeout_s
        self._cancelled = threading.Event()
        self._idle = False
        self._start(first)

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """See `Workers.segment`."""
        if not self._process.is_alive() and not self._cancelled.is_set():
            self._start(job)
        if self._cancelled.is_set():
            raise Cancelled(f"{job.path.name}: cancelled; run the same command again to resume")
        self._idle = False
        try:
            with suppress(OSError):  # the process has exited; _wait raises the error
                self._connection.send((job, output))
            ended = self._wait(job, progress)
        except BaseException as error:
            # The finished blocks are on the disk.
            self.close()
            if isinstance(error, KeyboardInterrupt):
                raise Cancelled(
                    f"{job.path.name}: interrupted; run the same command again to resume from the finished blocks"
                ) from None
            raise
        self._idle = True
        return ended.result()

    def cancel(self) -> None:
        """See `Workers.cancel`."""
        self._cancelled.set()
        self._process.kill()

    def close(self) -> None:
        """End the process. A slide in progress is not finished."""
        self._connection.close()
        if self._idle:
            self._process.join(END_S)  # the process exits because its connection is closed
        self._process.kill()
        self._process.join(END_S)

    def _start(self, first: SlideJob | None) -> None:
        try:
            self._connection, self._process = self._started(first)
        except OSError as error:
            # The kernel reports EAGAIN if it allows no more processes.
            what = "out of threads" if error.errno == errno.EAGAIN else shortage(error)
            step = SHORTAGE_HELP[what] if what else "run wsi-segment doctor, which examines the machine"
            raise ClusterError(f"{_CANNOT_START} ({error.strerror or error}); {step}") from error
        try:
            ready = self._answer()
            if ready is None and first is not None:
                # The process may have crashed while it planned the slide. `segment` will raise the error of that slide.
                self.close()
                self._start(None)
                return
            if ready is None:
                killed = self._process.exitcode == -signal.SIGKILL
                reason = ", most likely because memory ran out; raise the limit of the container" if killed else ""
                raise ClusterError(f"{_CANNOT_START} ({self._how()}){reason}")
            ready.result()
        except BaseException:
            self.close()
            raise
        self._idle = True

    def _started(self, first: SlideJob | None) -> tuple[Connection, SpawnProcess]:
        start_silent_tracker()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        level = logging.getLogger().level
        process = context.Process(
            target=_serve, args=(theirs, self._model, self._config, first, level), name="slides", daemon=True
        )
        try:
            with theirs, _ctrl_c_blocked():
                process.start()
        except OSError:
            ours.close()
            raise
        return ours, process

    def _answer(self) -> Any:
        """Return the next message of the process, or None if the process has exited."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_S)
            return None

    def _wait(self, job: SlideJob, progress: Progress) -> Outcome[SlideResult]:
        """Report progress until the slide is finished."""
        deadline = time.monotonic() + (math.inf if self._timeout_s is None else self._timeout_s)
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            if not self._connection.poll(min(left_s, _POLL_S)):
                if left_s > _POLL_S:
                    continue
                assert self._timeout_s is not None
                raise SlideTimeoutError.after(job.path.name, self._timeout_s)
            message = self._answer()
            if message is None:
                raise self._lost(job)
            if isinstance(message, Outcome):
                return message
            progress(*message)

    def _lost(self, job: SlideJob) -> PipelineError:
        """Return the error for a process that exited while it segmented the slide."""
        if self._cancelled.is_set():
            return Cancelled(f"{job.path.name}: cancelled; run the same command again to resume")
        if self._process.exitcode == -signal.SIGKILL:
            return WorkerLostError(
                f"{job.path.name}: its process was killed, most likely because memory ran out; lower --num-workers "
                f"or --batch-size, and run the same command again to resume from the finished blocks"
            )
        if self._process.exitcode in _ENDED_FROM_OUTSIDE:
            return WorkerLostError(
                f"{job.path.name}: its process was ended by {self._how()}; run the same command again to resume from "
                f"the finished blocks"
            )
        return WorkerCrashedError(
            f"{job.path.name}: its process crashed ({self._how()}), most likely in the library that reads the slide; "
            f"copy or scan the slide again, or try another --backend"
        )

    def _how(self) -> str:
        """Return how the process ended: the name of a signal, or the exit status."""
        code = self._process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Keep the terminal's Ctrl-C from processes that start in this context. They inherit blocked signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _serve(connection: Connection, model: str, config: SegmentConfig, first: SlideJob | None, level: int) -> None:
    """Segment the requested slides until the connection closes."""
    with imported_for_good():
        from pipeline.workers.in_process import open_in_process  # loads torch, which the waiting process does not need

    log_to_stderr(level)
    keep_freed_memory()
    with ExitStack() as stack:
        try:
            workers = stack.enter_context(open_in_process(model, config, first=first))
            ready = Outcome(True)
        except Exception as error:  # noqa: BLE001 - the parent raises the error
            ready = Outcome.failed(error)
        try:
            connection.send(ready)
            while not ready.errors:
                job, output = connection.recv()
                connection.send(_segmented(workers, job, output, connection))
        except (EOFError, OSError):
            log.debug("the parent has closed the connection")


def _segmented(workers: Workers, job: SlideJob, output: Path, connection: Connection) -> Outcome[SlideResult]:
    def report(stage: str, done: int, total: int) -> None:
        try:
            connection.send((stage, done, total))
        except OSError as error:
            raise Cancelled("the parent process has exited") from error

    try:
        return Outcome(workers.segment(job, output, report))
    except Exception as error:  # noqa: BLE001 - the parent raises the error
        if not isinstance(error, WsiSegmentError):
            error.add_note("".join(traceback.format_exception(error)))
        return Outcome.failed(error)
