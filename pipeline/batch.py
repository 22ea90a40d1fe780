"""Several slides, one after the other: which they are, and how each ended."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.errors import ModelError
from models.predictor import Predictor
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled, ConfigError, OutputError, PipelineError
from pipeline.report import SlideResult, write_summary
from pipeline.segment import Progress, segment_slide
from wsi.errors import SlideError
from wsi.slide import SLIDE_SUFFIXES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideJob:
    """A slide to be segmented, and its own micrometres per pixel where a manifest states one."""

    path: Path
    mpp: float | None = None


def collect_jobs(inputs: Sequence[Path], *, recursive: bool = False) -> list[SlideJob]:
    """The slides that some paths stand for: files as they are, folders by file ending, CSV manifests by their rows.

    A manifest has a header with the column `slide` (a path, relative to the manifest) and, if wanted, `mpp`. A slide
    that is named twice is taken once.

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
    predictor: Predictor,
    config: SegmentConfig,
    progress: Callable[[SlideJob], Progress],
    report: Callable[[SlideResult], None],
) -> list[SlideResult]:
    """Segment slides one after the other; one that fails is reported and the others go on.

    `summary.csv` is up to date after each. Slides whose results would have the same name fail before any is begun.

    Raises Cancelled on KeyboardInterrupt.
    """
    clashes = name_clashes(jobs)
    results: list[SlideResult] = []
    for job in jobs:
        start = time.perf_counter()
        try:
            if job.path in clashes:
                raise ConfigError(clashes[job.path])
            settings = config if job.mpp is None else replace(config, mpp=job.mpp)
            result = segment_slide(job.path, output, predictor, settings, progress(job))
        except Cancelled:
            raise
        except Exception as error:
            log.debug("%s failed", job.path, exc_info=True)
            result = SlideResult(job.path.stem, "failed", time.perf_counter() - start, error=failure(job, error))
        results.append(result)
        report(result)
        if job.path not in clashes:
            _summarise(output, [result])
    _summarise(output, [r for job, r in zip(jobs, results, strict=True) if job.path in clashes])
    return results


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


def name_clashes(jobs: Iterable[SlideJob]) -> dict[Path, str]:
    """What to say of each slide whose result would overwrite another's, by the slide's path."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for job in jobs:
        # Folded: some file systems do not tell case apart.
        groups[job.path.stem.casefold()].append(job.path)
    return {
        path: f"{path}: has the same name as {', '.join(str(p) for p in paths if p != path)}, and results are named "
        f"after slides; rename one, or use another --output for it"
        for paths in groups.values()
        if len(paths) > 1
        for path in paths
    }


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
    return path.suffix.lower() in SLIDE_SUFFIXES and path.is_file() and not path.name.startswith(".")


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
        text = (row.get("mpp") or "").strip()
        try:
            mpp = float(text) if text else None
        except ValueError:
            mpp = math.nan
        if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"{path}, line {number}: mpp is {text!r}; it must be a positive number, or empty")
        yield SlideJob(path.parent / name, mpp)
