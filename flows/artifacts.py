"""The artifacts of a flow run on Prefect's page: the progress, and the table of results."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.privacy import Redact
from pipeline.batch.tally import slide_count, tally
from pipeline.errors import RunRecordError
from pipeline.results.names import GEOJSON_END, PAGE, PREVIEW
from pipeline.results.record import read_run
from pipeline.results.slide_result import AREA_COLUMN, SlideResult

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Seconds between two updates of the progress."""

UPDATE_S = 5.0
"""Timeout of an update of the progress, in seconds."""

TABLE_ROWS = 1000
"""Most rows in the table of results, failed slides first. summary.csv contains all slides."""

Answer = TypeVar("Answer")


class SlideProgress:
    """The progress artifact of a batch. Slides report from any thread; only the flow's thread calls `show`."""

    def __init__(self, total: int) -> None:
        self._total, self._ended = total, 0
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._shown = time.monotonic()
        self._id = _new_progress(0.0, self._text())

    def of_slide(self, name: str) -> Callable[[str, int, int], None]:
        """Return the progress callback of one slide."""

        def told(_stage: str, done: int, total: int) -> None:
            if total > 1:  # later stages are short, single steps
                with self._lock:
                    self._running[name] = done / total

        return told

    def ended(self, name: str) -> None:
        """Count a slide that needs no more work."""
        with self._lock:
            self._running.pop(name, None)
            self._ended += 1

    def show(self, *, now: bool = False) -> None:
        """Update the artifact, unless it was updated less than `EVERY_S` ago."""
        if self._id is None or (not now and time.monotonic() - self._shown < EVERY_S):
            return
        with self._lock:
            share = (self._ended + sum(self._running.values())) / max(1, self._total)
        _update_progress(self._id, 100 * share, self._text())
        self._shown = time.monotonic()

    def _text(self) -> str:
        return f"{self._ended} of {slide_count(self._total)}"


class StageProgress:
    """A progress callback that shows one artifact for each stage of a training run."""

    def __init__(self) -> None:
        self._stage = ""
        self._id: UUID | None = None
        self._shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done / max(1, total)
        if stage != self._stage:
            self._stage = stage
            self._id = _new_progress(percent, stage)
        elif self._id is not None and (done == total or time.monotonic() - self._shown >= EVERY_S):
            _update_progress(self._id, percent, stage)
            self._shown = time.monotonic()


def show_metrics(run: Path, metrics: dict[str, float]) -> None:
    """Write the table of a trained bundle's metrics."""
    table: list[dict[str, object]] = [{"metric": name, "value": value} for name, value in metrics.items()]
    _without_server(lambda: create_table_artifact(table, key=artifact_key("training", run.absolute().name)))


def show_table(
    output: Path, results: Sequence[SlideResult], redact: Redact, *, links: bool, incomplete: str = ""
) -> None:
    """Write the table of results, under a key that all batches into this folder share. `links` shows its path.

    `incomplete` states which rows are missing from summary.csv.
    """
    ordered = sorted(results, key=lambda r: (r.status != "failed", r.slide))
    rows = [_row(result, redact, links=links) for result in ordered[:TABLE_ROWS]]
    classes = {name: None for row in rows for name in row if name.startswith(AREA_COLUMN)}
    columns = ["slide", "status", "seconds", "tissue_mm2", *classes]
    columns += ["error", "warnings", "preview", "GeoJSON", "stages"]
    used = [name for name in columns if any(row.get(name) not in ("", None) for row in rows)]
    table = [{name: row.get(name, "") for name in used} for row in rows]
    text = tally(results)
    if len(ordered) > len(rows):
        text += f"\n\nThe first {len(rows)} of {len(ordered)}; summary.csv has all."
    if incomplete:
        text += f"\n\n{redact(incomplete)}"
    report = output / PAGE
    if report.exists():
        text += f"\n\nReport: {report.absolute().as_uri() if links else report.name}"
    folder = output.absolute()
    name = folder.name if links else hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    _without_server(lambda: create_table_artifact(table, key=artifact_key("slides", name), description=text))


def artifact_key(kind: str, name: str) -> str:
    """Return the key of a folder's table. Prefect allows lower-case letters, digits and dashes."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{kind}-{slug}".strip("-")


def _row(result: SlideResult, redact: Redact, *, links: bool) -> dict[str, object]:
    # A slash ends the name of a folder that cannot be searched.
    shown = result.slide if links else result.slide.rpartition("/")[2] or "(folder)"
    row: dict[str, object] = {"slide": shown, "status": result.status, "seconds": round(result.seconds, 1)}
    if result.tissue_mm2 is not None:
        row["tissue_mm2"] = round(result.tissue_mm2, 4)
    row |= {AREA_COLUMN + name: round(area, 4) for name, area in result.areas_mm2.items()}
    if result.folder is not None:
        row["stages"] = _stages(result.folder)
        for name, file in (("preview", PREVIEW), ("GeoJSON", result.folder.name + GEOJSON_END)):
            path = result.folder / file
            row[name] = path.absolute().as_uri() if links else f"{shown}/{file}"
    return row | {"warnings": redact("; ".join(result.warnings)), "error": redact(result.error)}


def _stages(folder: Path) -> str:
    try:
        run = read_run(folder)
    except RunRecordError:
        run = None
    seconds = run.seconds if run else {}
    # Stages with a colon are parts of others.
    return ", ".join(f"{stage} {s:.1f} s" for stage, s in seconds.items() if ":" not in stage and stage != "total")


def _new_progress(percent: float, text: str) -> UUID | None:
    # Prefect declares "or a coroutine". It returns one only under an event loop, and a flow's thread has none.
    return cast("UUID | None", _without_server(lambda: create_progress_artifact(percent, description=text)))


def _update_progress(artifact: UUID, percent: float, text: str) -> None:
    # Prefect's client would retry for minutes, and no slide would start in the meantime.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: UPDATE_S}):
        _without_server(lambda: update_progress_artifact(artifact, percent, text))


def _without_server(call: Callable[[], Answer]) -> Answer | None:
    """Return the value of the call, or log a warning and return None if the server fails: slides must not wait."""
    try:
        return call()
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("Prefect's server did not accept an artifact (%s); the slides continue", type(error).__name__)
        return None
