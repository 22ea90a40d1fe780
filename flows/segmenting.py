"""The slides of a flow run: the batch engine, with each attempt as a Prefect task and the results on the run's page."""

from __future__ import annotations

import csv
import glob
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from prefect import State
from prefect.states import Failed

from flows.artifacts import SlideProgress, show_table
from flows.ending import end_state
from flows.order import BatchRequest
from flows.parts import PartRuns
from flows.privacy import as_it_is, pipeline_log, without_folders
from pipeline.batch.earlier import EarlierRuns
from pipeline.batch.queue import run_batch
from pipeline.console import silence_tifffile
from pipeline.errors import ConfigError
from pipeline.files import is_file
from pipeline.results.folder import check_output
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob, Workers
from pipeline.workers.open import check_workers, open_workers
from wsi.errors import WsiSegmentError


def segment_order(order: BatchRequest) -> State[None]:
    """Segment the slides of a request within a flow run; return the state that the run ends in: see `end_state`."""
    silence_tifffile()
    with pipeline_log(order.redact):
        try:
            results, incomplete = _segment_all(order)
            return end_state(results, order.redact(incomplete))
        except WsiSegmentError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):
                raise error.__cause__ from None  # Ctrl-C is for the whole program; Prefect marks the run as crashed
            return Failed(message=order.redact(str(error)))
        except Exception as error:
            if not order.hide_paths:
                raise
            # Prefect would show the traceback with every path in it.
            return Failed(message=order.redact(f"{type(error).__name__}: {error}"))


def refused(error: ConfigError, source: str, *, hide_paths: bool) -> State[None]:
    """Return the state of a run that cannot start: no retry and no traceback would help."""
    message = str(error)
    redact = without_folders(_folders_of(source, message)) if hide_paths else as_it_is
    return Failed(message=redact(message))


def _folders_of(source: str, message: str) -> Iterator[Path | str]:
    """Yield the folders that a message about a source can name.

    These are the folders of the source, of what it matches as a glob, and of the cells of manifests.
    """
    for path in map(Path, (source, *glob.glob(source, recursive=True))):  # noqa: PTH207 - as in flows.batch
        yield path.parent
        if not is_file(path):
            yield path
        elif path.suffix.lower() == ".csv":
            for folder in map(os.path.dirname, _cells(path)):
                # A manifest can have thousands of folders, and without_folders examines each one on the disk.
                if Path(folder).name in message and "\0" not in folder:
                    yield from (folder, path.parent / folder)


def _cells(manifest: Path) -> list[str]:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            return [cell.strip() for row in csv.reader(file) for cell in row]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []  # the error that refused this manifest names no cell


def _segment_all(order: BatchRequest) -> tuple[list[SlideResult], str]:
    """Return the results, and a text about rows that are missing from summary.csv, which is empty if there are none."""
    check_workers(order.scheduler, slide_timeout_s=order.slide_timeout_s)
    check_output(order.output, "output")
    earlier = EarlierRuns(order.output, order.model, order.config, retry_failed=order.retry_failed)
    progress, ended = SlideProgress(len(order.jobs)), list[SlideResult]()
    missing: list[str] = []

    def opened(_: SlideJob) -> AbstractContextManager[Workers]:
        return open_workers(order.scheduler, order.model, order.config, slide_timeout_s=order.slide_timeout_s)

    def report(result: SlideResult) -> None:
        ended.append(result)
        progress.ended(result.slide)
        progress.show()

    try:
        with PartRuns(len(order.jobs), order.redact) as parts:
            results = run_batch(
                order.jobs,
                order.output,
                opened,
                lambda job: progress.of_slide(job.result_name),
                report,
                earlier=earlier,
                attempt=parts.attempt,
                tick=progress.show,
                slides_at_once=order.slides_at_once,
                lock_timeout_s=order.slide_timeout_s or math.inf,
                incomplete=missing.append,
            )
        return results, "".join(missing)
    finally:
        # Also after an interruption: the table then contains the slides that are done.
        progress.show(now=True)
        if ended:
            show_table(order.output, ended, order.redact, links=not order.hide_paths, incomplete="".join(missing))
