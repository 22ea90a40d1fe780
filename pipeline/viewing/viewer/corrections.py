"""Corrections of results in the viewer: what the page reads and saves. Only the page itself can save.

The page names a region by its number, its class and its area. If these do not fit together, or if the record of the
result is that of another run, the result has changed since the page read it, and nothing is saved. The page also sends
the author that it was loaded with. If the server has another author, it was restarted, and nothing is saved.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.errors import LabelingError
from pipeline.formats.features import feature_ids, geojson_text, read_features
from pipeline.labeling.corrections import (
    CORRECTION_EVENTS,
    Correction,
    CorrectionEvent,
    correction_features,
    corrections_file,
    latest_own,
    read_corrections,
    read_entries,
    relabeled,
)
from pipeline.labeling.corrections import current as current_corrections
from pipeline.labeling.event_file import Entry, EventFile
from pipeline.labeling.events import Undone
from pipeline.viewing.viewer.replaced import check_current, current, requested_result
from pipeline.viewing.viewer.results import Result
from pipeline.web.application import posted_json
from pipeline.web.request_threads import RequestThreads

log = logging.getLogger(__name__)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SaveRequest(_Request):
    author: str
    """The name under which the page believes that it saves. wsi-view may have been started again with another one."""


class RelabelRequest(_SaveRequest):
    """A region, and the label of its right class."""

    index: Annotated[int, Field(ge=0, lt=1 << 32)]
    """Number of the region in the file of the result, with at most as many bits as in `outlines`."""
    label: int
    area_mm2: float
    """What the page shows of the region."""
    after: Annotated[int, Field(ge=1)]


class UndoRequest(_SaveRequest):
    """The correction to undo."""

    last: int | None
    """The number that the page got as `last`. Another tab may have saved a correction since."""


class CorrectionPages:
    """The responses about the corrections of results."""

    def __init__(self, results: Mapping[str, Result], author: str) -> None:
        self._results = results
        self.author = author
        """The name under which corrections are saved."""
        # One thread: what is saved has an order.
        self._thread = RequestThreads("corrections", 1)

    def routes(self, here: str) -> list[Route]:
        """Return the routes below the data of a result."""
        return [
            Route(f"{here}/corrections.json", self.state),
            Route(f"{here}/corrections.geojson", self.export),
            Route(f"{here}/corrections", self.relabel, methods=["POST"]),
            Route(f"{here}/corrections/undo", self.undo, methods=["POST"]),
        ]

    def close(self) -> None:
        """Wait for what is being saved."""
        self._thread.shutdown()

    async def state(self, request: Request) -> Response:
        """Respond with the number and the new label of each corrected region.

        `last` is the number of the correction that an undo is about, or null if there is none.
        """
        return await self._answer(request, lambda _: {})

    async def relabel(self, request: Request) -> Response:
        """Save the class of a region, then respond as `state` does.

        A class that the author has already given the region is not saved again: the answer may have been lost.
        """
        asked = await posted_json(request, RelabelRequest)
        self._check_author(asked.author)

        def save(result: Result) -> dict[str, object]:
            classes = result.run.classes
            region = next(islice(read_features(result.outlines, classes), asked.index, None), None)
            # Only now: the regions may already be those of a result that has replaced the loaded one.
            check_current(result)
            identity = result.run.identity
            known = region is not None and (region.label, region.area_mm2) == (asked.label, asked.area_mm2)
            if region is None or not known or asked.after > len(classes):
                raise HTTPException(409, "The result has changed; reload the page.")
            after = classes[asked.after - 1].name
            own = [one.event for one in read_corrections(result.folder) if one.annotator == self.author]
            if (region.id, after) not in [(one.region, one.after) for one in own]:
                self._append(result, relabeled(region, identity.slide, identity.model, after))
            return {}

        return await self._answer(request, save)

    async def undo(self, request: Request) -> Response:
        """Undo the author's latest correction that the page shows, then respond as `state` does.

        `undone` is the number of its region, or null if there was none. If the latest correction is not the one that
        the page names, because another tab has saved since, nothing is undone and `elsewhere` is true.
        """
        asked = await posted_json(request, UndoRequest)
        self._check_author(asked.author)

        def save(result: Result) -> dict[str, object]:
            entries = read_entries(result.folder)
            numbers = _numbers(result) if entries else {}
            latest = self._latest(result, entries, numbers)
            if asked.last != (latest and latest.number):
                return {"undone": None, "elsewhere": True}
            if latest is None:
                return {"undone": None, "elsewhere": False}
            check_current(result)
            self._append(result, Undone(numbers=(latest.number,)))
            return {"undone": numbers[latest.event.region], "elsewhere": False}

        return await self._answer(request, save)

    async def export(self, request: Request) -> Response:
        """Respond with the corrections as GeoJSON for QuPath."""
        result = self._result(request)

        def work() -> bytes:
            features = correction_features(read_corrections(result.folder), result.run.classes)
            return "".join(geojson_text(features)).encode()

        return Response(await self._run(request, result, work), media_type="application/geo+json")

    def _check_author(self, asked: str) -> None:
        """Raise HTTPException 409 for a page that was loaded from a server of another author."""
        if asked != self.author:
            raise HTTPException(
                409,
                f"wsi-view now runs with --annotator {self.author}, and this page was loaded with {asked}. Reload "
                f"the page to save as {self.author}.",
            )

    def _latest(
        self, result: Result, entries: Sequence[Entry[CorrectionEvent]], numbers: Mapping[str, int]
    ) -> Correction | None:
        """Return the author's latest correction that the page shows, or None."""
        labels = _labels(result)
        return latest_own(entries, self.author, lambda event: event.region in numbers and event.after in labels)

    def _append(self, result: Result, event: CorrectionEvent) -> None:
        with EventFile(corrections_file(result.folder), CORRECTION_EVENTS) as events:
            events.append(self.author, [event])

    async def _answer(self, request: Request, work: Callable[[Result], dict[str, object]]) -> Response:
        result = self._result(request)

        def worked() -> bytes:
            extra = work(result)
            return json.dumps(self._state(result) | extra).encode()

        return Response(await self._run(request, result, worked), media_type="application/json")

    def _state(self, result: Result) -> dict[str, object]:
        entries = read_entries(result.folder)
        corrections = current_corrections(entries)
        labels = _labels(result)
        numbers = _numbers(result) if entries else {}
        shown = [
            {"index": numbers[one.event.region], "after": labels[one.event.after], "author": one.annotator}
            for one in corrections
            if one.event.region in numbers and one.event.after in labels
        ]
        latest = self._latest(result, entries, numbers)
        return {
            "author": self.author,
            "corrections": shown,
            "others": len(corrections) - len(shown),
            "last": latest and latest.number,
        }

    def _result(self, request: Request) -> Result:
        return requested_result(request, self._results)

    async def _run(self, request: Request, result: Result, work: Callable[[], bytes]) -> bytes:
        def checked() -> bytes:
            with current(result):
                return work()

        try:
            made = await self._thread.run(request, checked)
        except (LabelingError, OSError) as error:
            log.error("%s: %s", result.name, error)
            raise HTTPException(
                507, "The corrections cannot be read or written; see the terminal for the reason."
            ) from error
        assert made is not None
        return made


def _numbers(result: Result) -> dict[str, int]:
    """Return the number of each region by its id."""
    return {region: index for index, region in enumerate(feature_ids(result.outlines))}


def _labels(result: Result) -> dict[str, int]:
    """Return the label of each class by its name."""
    return {one.name: label for label, one in enumerate(result.run.classes, start=1)}
