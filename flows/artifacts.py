"""What the page of a flow run shows of its slides: how far they are, and a table of how each ended."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.privacy import Said
from pipeline.errors import RunRecordError
from pipeline.results.names import GEOJSON_END, PAGE, PREVIEW
from pipeline.results.record import read_run
from pipeline.results.slide_result import STATUSES, SlideResult

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Between two updates of the progress."""

UPDATE_S = 5.0
"""The longest that an update of the progress waits for Prefect's server."""

TABLE_ROWS = 1000
"""Of the table of results, failed slides first; summary.csv has all of them."""

Answer = TypeVar("Answer")


class SlideProgress:
    """The progress artifact of a batch. Slides may tell of theirs from any thread; `show` is the flow's own."""

    def __init__(self, total: int) -> None:
        self._total, self._ended = total, 0
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._shown = time.monotonic()
        self._id = _new_progress(0.0, self._text())

    def of_slide(self, name: str) -> Callable[[str, int, int], None]:
        """Make the callback that the pipeline tells how far one slide is."""

        def told(_stage: str, done: int, total: int) -> None:
            if total > 1:  # later stages are single steps, and short
                with self._lock:
                    self._running[name] = done / total

        return told

    def ended(self, name: str) -> None:
        """Count a slide that needs no more work."""
        with self._lock:
            self._running.pop(name, None)
            self._ended += 1

    def show(self, *, now: bool = False) -> None:
        """Bring the artifact up to date, unless that was done a moment ago."""
        if self._id is None or (not now and time.monotonic() - self._shown < EVERY_S):
            return
        with self._lock:
            share = (self._ended + sum(self._running.values())) / max(1, self._total)
        _update_progress(self._id, 100 * share, self._text())
        self._shown = time.monotonic()

    def _text(self) -> str:
        return f"{self._ended} of {slides(self._total)}"


class StageProgress:
    """A progress artifact for each stage of a training, which is called by it."""

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
    """Write the table of what a trained bundle scores."""
    table: list[dict[str, object]] = [{"metric": name, "value": value} for name, value in metrics.items()]
    _without_server(lambda: create_table_artifact(table, key=artifact_key("training", run)))


def show_table(output: Path, results: Sequence[SlideResult], said: Said, *, links: bool) -> None:
    """Write the table of results, under a key that all batches into this folder share."""
    ordered = sorted(results, key=lambda r: (r.status != "failed", r.slide))
    rows = [_row(result, said, links=links) for result in ordered[:TABLE_ROWS]]
    classes = {name: None for row in rows for name in row if name.endswith(" mm²")}
    columns = ["slide", "status", "seconds", *classes, "error", "warnings", "preview", "GeoJSON", "stages"]
    used = [name for name in columns if any(row.get(name) not in ("", None) for row in rows)]
    table = [{name: row.get(name, "") for name in used} for row in rows]
    text = counted(results)
    if len(ordered) > len(rows):
        text += f"\n\nThe first {len(rows)} of {len(ordered)}; summary.csv has all."
    report = output / PAGE
    if report.exists():
        text += f"\n\nReport: {report.absolute().as_uri() if links else report.name}"
    _without_server(lambda: create_table_artifact(table, key=artifact_key("slides", output), description=text))


def artifact_key(kind: str, output: Path) -> str:
    """The key of the table for a folder of results: Prefect allows lower-case letters, digits and dashes."""
    slug = re.sub(r"[^a-z0-9]+", "-", output.absolute().name.lower()).strip("-")
    return f"{kind}-{slug}".strip("-")


def counted(results: Sequence[SlideResult]) -> str:
    """How many slides ended in which way: "8 slides: 5 done, 1 no tissue, 2 failed"."""
    counts = Counter(result.status for result in results)
    return f"{slides(len(results))}: " + (", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s]) or "none")


def slides(count: int) -> str:
    """A number of slides in words."""
    return f"{count} slide{'' if count == 1 else 's'}"


def _row(result: SlideResult, said: Said, *, links: bool) -> dict[str, object]:
    row: dict[str, object] = {"slide": result.slide, "status": result.status, "seconds": round(result.seconds, 1)}
    if result.tissue_mm2 is not None:
        row["tissue mm²"] = round(result.tissue_mm2, 4)
    row |= {f"{name} mm²": round(area, 4) for name, area in result.areas_mm2.items()}
    if result.folder is not None:
        row["stages"] = _stages(result.folder)
        for name, file in (("preview", PREVIEW), ("GeoJSON", result.slide + GEOJSON_END)):
            path = result.folder / file
            row[name] = path.absolute().as_uri() if links else f"{result.slide}/{file}"
    return row | {"warnings": said("; ".join(result.warnings)), "error": said(result.error)}


def _stages(folder: Path) -> str:
    try:
        run = read_run(folder)
    except RunRecordError:
        run = None
    seconds = run.seconds if run else {}
    # Stages with a colon are parts of others.
    return ", ".join(f"{stage} {s:.1f} s" for stage, s in seconds.items() if ":" not in stage and stage != "total")


def _new_progress(percent: float, text: str) -> UUID | None:
    # Prefect says "or a coroutine"; that is so where an event loop runs, and in a flow's thread none does.
    return cast("UUID | None", _without_server(lambda: create_progress_artifact(percent, description=text)))


def _update_progress(artifact: UUID, percent: float, text: str) -> None:
    # Prefect's client would try for minutes, in which no slide would be begun.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: UPDATE_S}):
        _without_server(lambda: update_progress_artifact(artifact, percent, text))


def _without_server(call: Callable[[], Answer]) -> Answer | None:
    """The call's answer; None, and a warning, where the server does not take it: slides do not wait for a page."""
    try:
        return call()
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("Prefect's server did not take an artifact (%s); the slides go on", type(error).__name__)
        return None
