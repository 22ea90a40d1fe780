"""A process of its own that segments slides: a native reader that crashes ends it, and the batch goes on.

The two talk through a pair of pipes that have no name; no port is opened.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.config import SegmentConfig
from pipeline.errors import (
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
from pipeline.workers.malloc import keep_freed_memory
from pipeline.workers.outcome import Outcome
from pipeline.workers.semaphores import start_silent_tracker
from wsi.errors import WsiSegmentError

log = logging.getLogger(__name__)

END_S = 10.0
"""How long a process that has gone may take to be seen as gone."""


class SlideProcess:
    """Segments one slide at a time in a child process, which is started anew after a slide that has ended it."""

    slides_at_once = 1

    def __init__(
        self, model: str, config: SegmentConfig, *, slide_timeout_s: float | None = None, first: SlideJob | None = None
    ) -> None:
        """Start the process and wait until it has the model. Raises ModelError, or ClusterError where it cannot start.

        `first`: see `open_workers`.
        """
        self._model = model
        self._config = config
        self._timeout_s = slide_timeout_s
        self._cancelled = threading.Event()
        self._idle = False
        self._start(first)

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        if not self._process.is_alive() and not self._cancelled.is_set():
            self._start(job)
        if self._cancelled.is_set():
            raise Cancelled(f"{job.path.name}: stopped; run the same command again to go on")
        self._idle = False
        try:
            with suppress(OSError):  # it has gone, which the answer tells
                self._connection.send((job, output))
            ended = self._wait(job, progress)
        except BaseException as error:
            # What it has finished is on the disk.
            self.close()
            if isinstance(error, KeyboardInterrupt):
                raise Cancelled(
                    f"{job.path.name}: interrupted; run the same command again to go on from the blocks that are "
                    f"finished"
                ) from None
            raise
        self._idle = True
        return ended.result()

    def cancel(self) -> None:
        self._cancelled.set()
        self._process.kill()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        if self._idle:
            self._process.join(END_S)  # it goes by itself once nobody can ask for slides any more
        self._process.kill()
        self._process.join(END_S)

    def _start(self, first: SlideJob | None) -> None:
        start_silent_tracker()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        level = logging.getLogger().level
        self._process = context.Process(
            target=_serve, args=(theirs, self._model, self._config, first, level), name="slides", daemon=True
        )
        with theirs, _ctrl_c_held_back():
            self._process.start()
        try:
            ready = self._answer()
            if ready is None and first is not None:
                # Perhaps it crashed at the slide that it planned: that one fails when its turn comes.
                self.close()
                self._start(None)
                return
            if ready is None:
                raise ClusterError(f"the process that segments the slides cannot start ({self._how()})")
            ready.result()
        except BaseException:
            self.close()
            raise
        self._idle = True

    def _answer(self) -> Any:
        """What the process says next; None where it has gone."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_S)
            return None

    def _wait(self, job: SlideJob, progress: Progress) -> Outcome[SlideResult]:
        """Pass progress on until the slide has ended."""
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while self._connection.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
            message = self._answer()
            if message is None:
                raise self._lost(job)
            if isinstance(message, Outcome):
                return message
            progress(*message)
        assert self._timeout_s is not None
        raise SlideTimeoutError.after(job.path.name, self._timeout_s)

    def _lost(self, job: SlideJob) -> PipelineError:
        """Why the process has gone in the middle of a slide."""
        if self._cancelled.is_set():
            return Cancelled(f"{job.path.name}: stopped; run the same command again to go on")
        if self._process.exitcode == -signal.SIGKILL:
            return WorkerLostError(
                f"{job.path.name}: the process that worked on it was killed, most likely for want of memory; lower "
                f"--num-workers or --batch-size, and run the same command again to go on from the finished blocks"
            )
        return WorkerCrashedError(
            f"{job.path.name}: the process that worked on it crashed ({self._how()}), most likely in the library that "
            f"reads it; copy or scan it again, or try the other --backend"
        )

    def _how(self) -> str:
        """How the process ended."""
        code = self._process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A process that is started in this context does not get the terminal's Ctrl-C: it inherits blocked signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _serve(connection: Connection, model: str, config: SegmentConfig, first: SlideJob | None, level: int) -> None:
    """Segment the slides that are asked for, until nobody asks any more."""
    from pipeline.workers.in_process import open_in_process  # loads torch, which the waiting process does without

    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    keep_freed_memory()
    with ExitStack() as stack:
        try:
            workers = stack.enter_context(open_in_process(model, config, first=first))
            ready = Outcome(True)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told there
            ready = Outcome.by(error)
        try:
            connection.send(ready)
            while not ready.errors:
                job, output = connection.recv()
                connection.send(_segmented(workers, job, output, connection))
        except (EOFError, OSError):
            log.debug("nobody asks for slides any more")


def _segmented(workers: Workers, job: SlideJob, output: Path, connection: Connection) -> Outcome[SlideResult]:
    def tell(stage: str, done: int, total: int) -> None:
        try:
            connection.send((stage, done, total))
        except OSError as error:
            raise Cancelled("nobody waits for it any more") from error

    try:
        return Outcome(workers.segment(job, output, tell))
    except Exception as error:  # noqa: BLE001 - as above
        if not isinstance(error, WsiSegmentError):
            error.add_note("".join(traceback.format_exception(error)))
        return Outcome.by(error)
