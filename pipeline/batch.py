"""Several slides: which they are, and how each ended."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.bundle import shipped_bundles
from models.errors import ModelError
from pipeline.errors import Cancelled, ConfigError, LockedError, OutputError, PipelineError
from pipeline.folders import is_locked
from pipeline.pages.report_page import write_report
from pipeline.report import SlideResult, write_summary
from wsi.errors import SlideError
from wsi.slide import SLIDE_SUFFIXES

if TYPE_CHECKING:  # they take the jobs of this module
    from pipeline.segment import Progress
    from pipeline.workers import Workers

log = logging.getLogger(__name__)

MAX_AT_ONCE = 64
"""Slides at a time, however large a cluster is: each has a thread here that waits for it."""

OWN_NAMES = frozenset({"index.html", "qupath", "summary.csv"})
"""What runs write beside the slides' folders."""

LOCK_CHECK_S = 1.0
"""How often a slide that another process is working on is looked at."""


@dataclass(frozen=True)
class SlideJob:
    """A slide to be segmented, and what a manifest states for it alone."""

    path: Path
    mpp: float | None = None
    """Micrometres per level-0 pixel; None: what the run's settings say."""
    model: str | None = None
    """Name or path of a bundle; None: the run's model."""


def collect_jobs(inputs: Sequence[Path], *, recursive: bool = False) -> list[SlideJob]:
    """The slides that some paths stand for: files as they are, folders by file ending, CSV manifests by their rows.

    A manifest has a header with the column `slide` (a path, relative to the manifest) and, if wanted, `mpp` and `model`
    (the name of a shipped model, or a bundle's path, relative to the manifest). A slide that is named twice is taken
    once.

    Raises ConfigError where a folder holds no slide or a manifest cannot be used.
    """
    jobs: dict[str, SlideJob] = {}
    for path in inputs:
        for job in _expand(path, recursive=recursive):
            # Unlike Path.resolve, this does not stumble over a loop of links.
            jobs.setdefault(os.path.realpath(job.path), job)
    return list(jobs.values())


def segment_batch(
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
    if isinstance(error, (SlideError, ModelError, PipelineError)):
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


def name_clashes(jobs: Iterable[SlideJob]) -> dict[Path, str]:
    """What to say of each slide whose result would overwrite another's or a run's own files, by the slide's path."""
    groups: dict[str, list[Path]] = defaultdict(list)
    reserved: dict[Path, str] = {}
    for job in jobs:
        # A dot begins the names of working folders and locks; alone or twice it would be a folder that is there.
        if job.path.stem.casefold() in OWN_NAMES or job.path.stem.startswith(".") or not job.path.stem:
            reserved[job.path] = (
                f"{job.path}: results are named after slides, and {job.path.stem!r} cannot be a result's name (nor can "
                f"{', '.join(sorted(OWN_NAMES))} and what begins with a dot); rename the slide, or link to it by "
                f"another name"
            )
        # Folded: some file systems do not tell case apart.
        groups[job.path.stem.casefold()].append(job.path)
    same = {
        path: f"{path}: has the same name as {_others(path, paths)}, and results are named after slides; rename one, "
        f"or use another --output for it"
        for paths in groups.values()
        if len(paths) > 1
        for path in paths
    }
    return same | reserved


def _others(path: Path, paths: Sequence[Path]) -> str:
    """The first few of the other paths: of a thousand slides of one name, each would name all others."""
    first = [str(other) for other in paths[:4] if other != path][:3]
    more = len(paths) - 1 - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _expand(path: Path, *, recursive: bool) -> Iterator[SlideJob]:
    if _is_dir(path):
        found = sorted(p for p in (path.rglob("*") if recursive else path.glob("*")) if _is_slide(p))
        if not found and path.suffix.lower() in SLIDE_SUFFIXES:
            found = [path]  # fails by its name, and the other slides go on
        if not found:
            hint = "" if recursive else "; pass --recursive to search its subfolders"
            raise ConfigError(f"{path}: no slides in this folder (endings: {' '.join(sorted(SLIDE_SUFFIXES))}){hint}")
        yield from (SlideJob(p) for p in found)
    elif path.suffix.lower() == ".csv":
        yield from _read_manifest(path)
    else:
        yield SlideJob(path)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path") from error


def _is_slide(path: Path) -> bool:
    if path.suffix.lower() not in SLIDE_SUFFIXES or path.name.startswith("."):
        return False
    try:
        return path.is_file()
    except OSError:
        return True  # a stale mount, or no right to look: it fails by its name, and the other slides go on


def _read_manifest(path: Path) -> Iterator[SlideJob]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a manifest: {error}") from error
    if not rows or "slide" not in rows[0][1]:
        raise ConfigError(f"{path}: a manifest needs a header with a column 'slide' and at least one row below it")
    for number, row in rows:
        name = (row["slide"] or "").strip()
        if not name:
            raise ConfigError(f"{path}, line {number}: the column 'slide' is empty")
        if "\0" in name:
            raise ConfigError(f"{path}, line {number}: the column 'slide' holds a zero byte, which no file's name can")
        text = (row.get("mpp") or "").strip()
        try:
            mpp = float(text) if text else None
        except ValueError:
            mpp = math.nan
        if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"{path}, line {number}: mpp is {text!r}; it must be a positive number, or empty")
        yield SlideJob(path.parent / name, mpp, _model(path, (row.get("model") or "").strip()))


def _model(manifest: Path, text: str) -> str | None:
    if not text or text in shipped_bundles():
        return text or None
    return str(manifest.parent / text)
