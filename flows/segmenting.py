"""A flow run's slides: the finished ones left out, the others a bounded number at a time, and how all of them ended."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from prefect import Flow, State, flow
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed

from flows.artifacts import SlideProgress, counted, show_table, slides
from flows.board import Board
from flows.order import BatchRequest
from flows.privacy import Said, as_it_is, pipeline_log, without_folders
from flows.slide_task import Attempt, segment_one
from models.bundle import load_bundle
from pipeline.batch.collect import name_clashes
from pipeline.batch.queue import MAX_AT_ONCE
from pipeline.errors import ConfigError, OutputError
from pipeline.pages.report_page import write_report
from pipeline.results.folder import finished_run, is_locked
from pipeline.results.record import read_header, run_identity, stored_runtime
from pipeline.results.slide_result import SlideResult, skipped_result
from pipeline.workers.base import SlideJob, Workers, job_config
from pipeline.workers.open import open_workers
from wsi.errors import WsiSegmentError
from wsi.slide import slide_digest, slide_stamp

log = logging.getLogger(__name__)

PART = 500
"""Slides per flow run, more are parts of their own: Prefect keeps the states of all tasks until a run ends."""

DIGESTS_AT_ONCE = 4
"""Slides looked at to see whether they are the ones that a result was made of; changed ones are read to the end."""

RETRY_DELAYS_S = (30.0, 120.0, 600.0)
"""Before the further tries of a slide that a stale mount or a lost worker has stopped."""

LOOK_S = 1.0
"""How often slides that are to come up again are looked at."""


def segment_order(order: BatchRequest) -> State[None]:
    """Segment the slides of an order within a flow run; returns the state that the run ends in.

    That is `Completed` if every slide was segmented, skipped or without tissue, else a failed state whose name says how
    many slides failed.
    """
    with pipeline_log(order.said):
        try:
            return _end(_segment_all(order))
        except WsiSegmentError as error:
            return Failed(message=order.said(str(error)))
        except Exception as error:
            if not order.hide_paths:
                raise
            # Prefect would show the traceback with every path in it.
            return Failed(message=order.said(f"{type(error).__name__}: {error}"))


def refused(error: ConfigError, source: str, *, hide_paths: bool) -> State[None]:
    """Make the state of a run that cannot begin: no retry and no traceback would help."""
    path = Path(source).absolute()
    hidden = [path.parent, Path(source).parent, *([] if path.is_file() else [path])]
    said = without_folders(hidden) if hide_paths else as_it_is
    return Failed(message=said(str(error)))


def _end(results: Sequence[SlideResult]) -> State[None]:
    failed = sum(result.status == "failed" for result in results)
    if failed:
        return Failed(name=f"{failed} of {slides(len(results))} failed", message=counted(results))
    return Completed(message=counted(results))


def _segment_all(order: BatchRequest) -> list[SlideResult]:
    clashes = name_clashes(order.jobs)
    jobs = [job for job in order.jobs if job.path not in clashes]
    finished = _finished(order, jobs)
    left = [job for job in jobs if job not in finished]
    log.info("%s: %d finished before, %d to do", slides(len(order.jobs)), len(finished), len(left))

    board = Board(order.output, SlideProgress(len(order.jobs)))
    for result in finished.values():
        board.ended(result)
    try:
        if left:
            timeout_s = order.slide_timeout_s
            with open_workers(order.scheduler, order.model, order.config, slide_timeout_s=timeout_s) as workers:
                _segment_parts(_Batch(order, workers, board, order.said), left)
        for path, message in clashes.items():
            board.ended(SlideResult(path.stem, "failed", 0.0, error=message))
    finally:
        # Of a run that is broken off, too: it says which slides are done.
        board.close()
        if board.results:
            _write_report(order.output)
            show_table(order.output, board.results, order.said, links=not order.hide_paths)
    return board.results


@dataclass(frozen=True)
class _Batch:
    order: BatchRequest
    workers: Workers
    board: Board
    said: Said

    @property
    def at_once(self) -> int:
        """How many slides may run; a cluster's number changes with its size."""
        return max(1, min(self.workers.slides_at_once, self.order.slides_at_once or MAX_AT_ONCE, MAX_AT_ONCE))


def _segment_parts(batch: _Batch, jobs: Sequence[SlideJob]) -> None:
    if len(jobs) <= PART:
        _segment(batch, jobs)
        return
    for first in range(0, len(jobs), PART):
        part = jobs[first : first + PART]
        ended = len(batch.board.results)
        try:
            part_flow = _part_flow(batch, part, f"slides {first + 1} to {first + len(part)} of {len(jobs)}")
            state = part_flow(return_state=True)
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            log.warning("Prefect's server does not answer (%s); the slides go on without it", type(error).__name__)
            there = {result.slide for result in batch.board.results}
            _segment(batch, [job for job in part if job.path.stem not in there])
            continue
        if len(batch.board.results) < ended + len(part):
            state.result()  # raises what has stopped it; slides that failed have not


def _part_flow(batch: _Batch, part: Sequence[SlideJob], name: str) -> Flow[[], State[None]]:
    """Make a flow for a part of a batch. It has no parameters, because Prefect would keep the path of every slide."""

    @flow(name="segment-part", flow_run_name=name)
    def segment_part() -> State[None]:
        return _end(_segment(batch, part))

    return segment_part


@dataclass
class _Coming:
    """A slide that has not ended, and when it comes up."""

    job: SlideJob
    due: float = 0.0
    """Not before, on `time.monotonic`'s clock."""
    tries: int = 0
    """That were stopped by something that can pass."""
    held_until: float | None = None
    """Where another run has it: when that run has had as long as a slide may take."""


AttemptQueue = queue.SimpleQueue[tuple[_Coming, PrefectFuture[State[Attempt]]]]


def _segment(batch: _Batch, jobs: Sequence[SlideJob]) -> list[SlideResult]:
    """Run the task of each slide, as many at a time as the workers take; those that another run holds come up again at
    the end, those that were stopped by something that can pass after a while.
    """
    results: list[SlideResult] = []
    waiting, later, ended = deque(map(_Coming, jobs)), list[_Coming](), AttemptQueue()
    running = 0
    try:
        while waiting or running or later:
            for one in [one for one in later if _is_due(batch, one, idle=not waiting and not running)]:
                later.remove(one)
                waiting.append(one)
            while waiting and running < batch.at_once:
                _submit(batch, waiting.popleft(), ended)
                running += 1
            try:
                one, future = ended.get(timeout=LOOK_S)
            except queue.Empty:
                batch.board.show()
                continue
            running -= 1
            outcome = _outcome(one.job, future)
            if _comes_again(batch, one, outcome):
                later.append(one)
                continue
            results.append(outcome.result)
            batch.board.ended(outcome.result)
    except BaseException:
        batch.workers.cancel()
        raise
    return results


def _submit(batch: _Batch, one: _Coming, ended: AttemptQueue) -> None:
    progress = batch.board.progress.of_slide(one.job.path.stem)
    segment = partial(batch.workers.segment, one.job, batch.order.output, progress)
    future = segment_one.submit(one.job, segment, batch.said, last=one.tries == len(RETRY_DELAYS_S))
    future.add_done_callback(lambda done: ended.put((one, done)))


def _comes_again(batch: _Batch, one: _Coming, outcome: Attempt) -> bool:
    """Whether a slide has not ended with this try; if so, notes when the next one is."""
    name, now = one.job.path.name, time.monotonic()
    if outcome.transient:
        delay_s = RETRY_DELAYS_S[one.tries]
        log.warning("%s; it is tried again in %.0f s", outcome.result.error, delay_s)
        one.tries, one.due = one.tries + 1, now + delay_s
    elif outcome.locked and one.held_until is None:
        log.info("%s: another run is at work on it; it comes up again at the end", name)
        one.held_until = now + (batch.order.slide_timeout_s or math.inf)
    return outcome.transient or (outcome.locked and one.held_until is not None and now < one.held_until)


def _is_due(batch: _Batch, one: _Coming, *, idle: bool) -> bool:
    now = time.monotonic()
    if one.held_until is None or now < one.due:
        return now >= one.due
    return idle and (now >= one.held_until or not is_locked(batch.order.output, one.job.path.stem))


def _outcome(job: SlideJob, future: PrefectFuture[State[Attempt]]) -> Attempt:
    outcome: object = future.result(raise_on_failure=False)
    if isinstance(outcome, Attempt):
        return outcome
    # The task's own machinery failed, not the slide.
    return Attempt(SlideResult(job.path.stem, "failed", 0.0, error=f"{job.path.name}: its task ended with {outcome!r}"))


def _finished(order: BatchRequest, jobs: Sequence[SlideJob]) -> dict[SlideJob, SlideResult]:
    """The slides whose results are there already, made of the same slide, model and parameters."""
    digests = {order.model: load_bundle(order.model).digest}
    if order.config.force:
        return {}

    def finished(job: SlideJob) -> SlideResult | None:
        return _finished_result(job, order, digests)

    with ThreadPoolExecutor(DIGESTS_AT_ONCE) as pool:
        results = pool.map(finished, jobs)
        return {job: result for job, result in zip(jobs, results, strict=True) if result is not None}


def _finished_result(job: SlideJob, order: BatchRequest, digests: dict[str, str]) -> SlideResult | None:
    start, folder = time.perf_counter(), order.output / job.path.stem
    header = read_header(folder)
    if header is None:
        return None
    try:
        model = job.model or order.model
        if model not in digests:
            digests[model] = load_bundle(model).digest
        stated = str(header.identity.get("slide"))
        config = job_config(job, order.config)
        runtime = stored_runtime(folder, config) if config.runtime == "auto" else config.runtime
        if runtime is None:
            return None
        run = finished_run(folder, run_identity(stated, digests[model], config.parameters(runtime)))
        if run is None:
            return None
        # Reading every finished slide again would take a night job hours.
        unwritten = run.slide.stamp == slide_stamp(job.path)
        if not unwritten and slide_digest(job.path) != stated:
            return None
    except WsiSegmentError:
        return None  # its task will say so
    return skipped_result(folder, run, time.perf_counter() - start)


def _write_report(output: Path) -> None:
    try:
        write_report(output)
    except (OSError, OutputError) as error:
        log.error("%s: no report was written: %s", output, error)
