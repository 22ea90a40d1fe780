"""Several slides: which they are, and how each ended."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipeline.batch.collect import name_clashes
from pipeline.errors import Cancelled, ConfigError, LockedError, OutputError
from pipeline.pages.report_page import write_report
from pipeline.progress import Progress
from pipeline.results.folder import is_locked
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from pipeline.workers.base import SlideJob, Workers
from wsi.errors import WsiSegmentError

log = logging.getLogger(__name__)

MAX_AT_ONCE = 64
"""Slides at a time, however large a cluster is: each has a thread here that waits for it."""


LOCK_CHECK_S = 1.0
"""How often a slide that another process is working on is looked at."""


def run_batch(
    jobs: Sequence[SlideJob],
    output: Path,
    workers: Workers,
    progress: Callable[[SlideJob], Progress],
    report: Callable[[SlideResult], None],
) -> list[SlideResult]:
    """Segment slides in this order, as many at a time as the workers take; one that fails is reported and the others
    go on. Returns the results in the order of the jobs.

    `summary.csv` is up to date after each, the report `index.html` at the end, also of a run that is broken off. Slides
    whose results would have the same name fail before any is begun. A slide that another process is working on is come
    back to once that has ended: it is then there already (`skipped`), or taken over where the other was killed.

    Raises Cancelled on KeyboardInterrupt.
    """
    clashes = name_clashes(jobs)
    results: dict[int, SlideResult] = {}

    def segment(number: int) -> SlideResult | None:
        job, start = jobs[number], time.perf_counter()
        try:
            if job.path in clashes:
                raise ConfigError(clashes[job.path])
            return workers.segment(job, output, progress(job))
        except LockedError:
            return None
        except Cancelled:
            raise
        except Exception as error:
            log.debug("%s failed", job.path, exc_info=True)
            return SlideResult(job.path.stem, "failed", time.perf_counter() - start, error=failure(job, error))

    try:
        waiting = list(range(len(jobs)))
        while waiting:
            locked = []
            for number, result in _each(segment, waiting, workers):
                if result is None:
                    log.warning("%s: another process is working on this slide; waiting for it", jobs[number].path.name)
                    locked.append(number)
                    continue
                results[number] = result
                report(result)
                if jobs[number].path not in clashes:
                    _summarise(output, [result])
            waiting = _when_free(jobs, output, locked)
        _summarise(output, [result for number, result in sorted(results.items()) if jobs[number].path in clashes])
    finally:
        if results:
            _write_report(output)
    return [results[number] for number in range(len(jobs))]


def _each(
    segment: Callable[[int], SlideResult | None], numbers: Sequence[int], workers: Workers
) -> Iterator[tuple[int, SlideResult | None]]:
    """The slides as they end, `workers.slides_at_once` at a time; that may change while they run."""
    if workers.slides_at_once == 1:
        # On this thread, where a KeyboardInterrupt reaches the slide itself.
        yield from ((number, segment(number)) for number in numbers)
        return
    left = deque(numbers)
    running: dict[Future[SlideResult | None], int] = {}
    with ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="slide") as pool:
        try:
            while left or running:
                while left and len(running) < min(workers.slides_at_once, MAX_AT_ONCE):
                    number = left.popleft()
                    running[pool.submit(segment, number)] = number
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException as error:
            workers.cancel()
            if isinstance(error, KeyboardInterrupt):
                raise Cancelled("interrupted; run the same command again to go on from what is finished") from None
            raise


def _when_free(jobs: Sequence[SlideJob], output: Path, locked: Sequence[int]) -> list[int]:
    """Wait until no process is working on the first of these slides; returns all of them."""
    try:
        while locked and is_locked(output, jobs[locked[0]].path.stem):
            time.sleep(LOCK_CHECK_S)
    except KeyboardInterrupt:
        raise Cancelled("interrupted; run the same command again to go on from what is finished") from None
    return list(locked)


def failure(job: SlideJob, error: Exception) -> str:
    """What to say of a slide that failed: our own errors speak for themselves, others are named with the slide."""
    if isinstance(error, WsiSegmentError):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"{job.path.name}: out of memory ({error}); lower --batch-size or --num-workers"
    return f"{job.path.name}: {type(error).__name__}: {error}; run again with -vv and report what it prints"


def _summarise(output: Path, results: list[SlideResult]) -> None:
    if not results:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_summary(output, results)
    except OSError as error:
        log.error("%s: cannot write summary.csv: %s", output, error.strerror)
    except OutputError as error:
        log.error("%s", error)


def _write_report(output: Path) -> None:
    try:
        write_report(output)
    except Exception as error:
        # The page says nothing that the results do not: hours of work must not be lost to it.
        log.error("%s: the report could not be written: %s", output, error)
        log.debug("the report could not be written", exc_info=True)
