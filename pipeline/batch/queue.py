"""The batch engine: many slides, from their list to the report. The command and the Prefect flow both run this."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.batch.attempt import Attempt, RunAttempt, attempt_slide
from pipeline.batch.board import Board
from pipeline.batch.earlier import EarlierRuns
from pipeline.batch.names import name_clashes, named_jobs
from pipeline.batch.slots import MAX_THREADS, CallingThread, ThreadSlots
from pipeline.batch.window import QueuedSlide, SlideQueue
from pipeline.errors import Cancelled, OutputError
from pipeline.pages.report_page import write_report
from pipeline.progress import Progress
from pipeline.results.folder import is_locked
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob, Workers

log = logging.getLogger(__name__)

LOOKUPS_AT_ONCE = 4
"""Threads that compare slides with the results of earlier runs before the first attempt."""

OpenWorkers = Callable[[SlideJob], AbstractContextManager[Workers]]
"""Opens workers for a batch whose first attempt is at this slide."""


def run_batch(
    jobs: Sequence[SlideJob],
    output: Path,
    workers: Workers | OpenWorkers,
    progress: Callable[[SlideJob], Progress],
    report: Callable[[SlideResult], None],
    *,
    earlier: EarlierRuns | None = None,
    attempt: RunAttempt | None = None,
    tick: Callable[[], None] = lambda: None,
    slides_at_once: int | None = None,
    lock_timeout_s: float = math.inf,
    incomplete: Callable[[str], None] = log.error,
) -> list[SlideResult]:
    """Segment slides, as many at a time as the workers take, and return their results in the order of the jobs.

    A slide that fails does not stop the others. Slides that failed transiently are retried, and slides that another run
    has locked are attempted after the others: see `SlideQueue`. Slides whose results cannot have names of their own
    fail without an attempt: see `named_jobs`. `summary.csv` is kept up to date, and the report `index.html` is written
    at the end, also if the batch is interrupted.

    Args:
        jobs: The slides, in the order of their first attempts.
        output: Folder for the results.
        workers: Open workers, or a function that opens them, which is called only if a slide has to be attempted.
        progress: Returns the progress callback of a slide.
        report: Called on the calling thread with each final result.
        earlier: Results of earlier runs. Slides with such a result are not attempted, and slides that fail permanently
            are remembered. None attempts all slides and remembers nothing.
        attempt: Runs each attempt on a thread of its own. None runs attempts as they are, and on the calling thread if
            the workers take one slide at a time.
        tick: Called on the calling thread about once per second while slides run.
        slides_at_once: Largest number of slides in flight; None leaves it to the workers.
        lock_timeout_s: Seconds after which a slide that another run has locked fails.
        incomplete: Called at the end with a message if rows of this run are missing from `summary.csv`.

    Raises:
        Cancelled: On KeyboardInterrupt, which is then its cause, or if the workers were cancelled.
        WsiSegmentError: If the workers cannot be opened or closed. The results until then are in the table.
    """
    batch = _Batch(named_jobs(jobs, output), output, report, earlier, Board(output), incomplete)
    try:
        slides = list(batch.without_results())
        if slides:
            with workers(slides[0].job) if callable(workers) else nullcontext(workers) as opened:
                _attempt_all(
                    batch, slides, _Attempts(batch, opened, progress, attempt, slides_at_once), lock_timeout_s, tick
                )
    except KeyboardInterrupt as interrupt:
        raise Cancelled("interrupted; run the same command again to resume") from interrupt
    finally:
        batch.close()
    return [batch.results[number] for number in range(len(jobs))]


@dataclass
class _Batch:
    jobs: Sequence[SlideJob]
    output: Path
    report: Callable[[SlideResult], None]
    earlier: EarlierRuns | None
    board: Board
    incomplete: Callable[[str], None]
    results: dict[int, SlideResult] = field(default_factory=dict)

    def without_results(self) -> Iterator[QueuedSlide]:
        """Yield the slides that have to be attempted, and add the results of all others."""
        clashes = name_clashes(self.jobs)
        for number, job in enumerate(self.jobs):
            if error := job.problem or clashes.get(job.path):
                self.add(number, SlideResult(job.result_name, "failed", 0.0, error=error))
        left = [number for number in range(len(self.jobs)) if number not in self.results]
        # Closed here, so that an interruption does not wait for the lookups of all other slides.
        with closing(self._earlier_results(left)) as results:
            for number, result in zip(left, results, strict=True):
                if result is None:
                    yield QueuedSlide(-math.inf, number, self.jobs[number])
                else:
                    self.add(number, result)
        log.info(
            "%d slides: %d have a result, %d to segment",
            len(self.jobs),
            len(self.results),
            len(self.jobs) - len(self.results),
        )

    def _earlier_results(self, numbers: Sequence[int]) -> Generator[SlideResult | None]:
        if self.earlier is None:
            yield from (None for _ in numbers)
            return
        pool = ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="lookup")
        try:
            yield from pool.map(self.earlier.result, [self.jobs[number] for number in numbers])
        finally:
            pool.shutdown(cancel_futures=True)

    def record(self, slide: QueuedSlide, attempt: Attempt) -> None:
        """Add the result of a final attempt, and remember a permanent failure."""
        if self.earlier is not None:
            self.earlier.record(slide.job, slide.stamp, attempt)
        self.add(slide.number, attempt.result)

    def add(self, number: int, result: SlideResult) -> None:
        """Add a final result."""
        self.results[number] = result
        self.board.add(result)
        self.report(result)

    def close(self) -> None:
        """Write the table and the report of the results so far."""
        if missing := self.board.close():
            self.incomplete(missing)
        if self.results:
            _write_report(self.output)


@dataclass(frozen=True)
class _Attempts:
    """Attempts at the slides of a batch, on open workers."""

    batch: _Batch
    workers: Workers
    progress: Callable[[SlideJob], Progress]
    run: RunAttempt | None
    slides_at_once: int | None

    def slots(self) -> ThreadSlots | CallingThread:
        """Return where these attempts run."""
        if self.run is None and self.workers.slides_at_once == 1:
            return CallingThread(self._attempt)
        return ThreadSlots(self._attempt)

    def at_once(self) -> int:
        """Return the width of the window; a cluster's number of workers changes."""
        return min(self.workers.slides_at_once, self.slides_at_once or MAX_THREADS, MAX_THREADS)

    def _attempt(self, slide: QueuedSlide) -> Attempt:
        def make() -> Attempt:
            return slide.settle(attempt_slide(slide.job, lambda: self._segment(slide)))

        return make() if self.run is None else self.run(slide.job, make)

    def _segment(self, slide: QueuedSlide) -> SlideResult:
        earlier, output = self.batch.earlier, self.batch.output
        if earlier is not None:
            slide.stamp = earlier.stamp(slide.job)
            if slide.locked_until is not None and (result := earlier.result(slide.job)) is not None:
                return result  # the run that had the lock made it
        return self.workers.segment(slide.job, output, self.progress(slide.job))


def _attempt_all(
    batch: _Batch,
    slides: Sequence[QueuedSlide],
    attempts: _Attempts,
    lock_timeout_s: float,
    tick: Callable[[], None],
) -> None:
    def locked(job: SlideJob) -> bool:
        try:
            return is_locked(batch.output, job.result_name)
        except (OSError, OutputError):
            return False  # the attempt reports the error, or retries a stale mount

    with attempts.slots() as slots:
        # The calling thread reports each slide before the next one starts, also if workers join a cluster of one.
        at_once = attempts.at_once if isinstance(slots, ThreadSlots) else lambda: 1
        try:
            for ended in SlideQueue(slides, slots, at_once, locked, lock_timeout_s):
                if ended is not None:
                    batch.record(*ended)
                batch.board.refresh()
                tick()
        except BaseException:
            attempts.workers.cancel()
            raise


def _write_report(output: Path) -> None:
    try:
        write_report(output)
    except Exception as error:
        # The report only shows what the results contain: a defect in it must not discard hours of work.
        log.error("%s: the report could not be written: %s", output, error)
        log.debug("the report could not be written", exc_info=True)
