"""The web application of wsi-label: the page, its pictures, and what the page saves.

A patch's id is looked up among those of the open slides, and never becomes part of a path. Only the page itself
can save: see `posted_json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TypeVar

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipeline.errors import LabelingError
from pipeline.labeling.desk import Desk
from pipeline.labeling.events import Labeled, Place
from pipeline.labeling.patches import CONTEXT
from pipeline.labeling.requests import GridRequest, LabelsRequest, PatchRequest, UndoRequest
from pipeline.labeling.session import Patch
from pipeline.labeling.similar import POOL
from pipeline.web.application import local_application, posted_json
from pipeline.web.cache import ByteCache
from wsi.errors import WsiSegmentError

log = logging.getLogger(__name__)

CACHE_BYTES = 32 << 20
QUALITY = 92
GRID = 24
"""Patches of a grid."""

ASSETS = {"label.css": "text/css", "label.js": "text/javascript", "single.js": "text/javascript",
          "orders.js": "text/javascript", "grid.js": "text/javascript", "server.js": "text/javascript"}  # fmt: skip

T = TypeVar("T")


def make_app(desk: Desk) -> Starlette:
    """Return the application. At its end it stops its own threads; `open_desk` closes the rest."""
    page = LabelPage(desk)
    routes = [
        Route("/", page.index),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/assets/{name}", page.asset),
        Route("/state.json", page.state),
        Route("/patches/{id}/patch.jpg", page.patch),
        Route("/patches/{id}/context.jpg", page.context),
        Route("/patches/{id}/slide.jpg", page.slide),
        Route("/labels", page.save, methods=["POST"]),
        Route("/undo", page.undo, methods=["POST"]),
        Route("/suggestion", page.suggestion, methods=["POST"]),
        Route("/grid", page.grid, methods=["POST"]),
    ]
    return local_application(routes, page.lifespan)


class LabelPage:
    """The responses of the routes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._cache = ByteCache(CACHE_BYTES)
        # Pictures must not wait for a request that waits for a slide.
        self._pictures = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        self._work = ThreadPoolExecutor(4, thread_name_prefix="labels")
        package = resources.files("pipeline.labeling")
        self._assets = {name: (package / "assets" / name).read_bytes() for name in ASSETS}
        self._pages = jinja2.Environment(loader=jinja2.PackageLoader("pipeline.labeling", "assets"), autoescape=True)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._desk.slides.cancel()
        for threads in (self._pictures, self._work):
            threads.shutdown(wait=True, cancel_futures=True)

    async def index(self, _: Request) -> Response:
        return HTMLResponse(self._pages.get_template("label.html").render(title=self._desk.title, context=CONTEXT))

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            raise HTTPException(404)
        return Response(self._assets[name], media_type=ASSETS[name])

    async def state(self, _: Request) -> Response:
        return await self._state()

    async def patch(self, request: Request) -> Response:
        return await self._picture(request, lambda ready, place: ready.patches.pixels(place))

    async def context(self, request: Request) -> Response:
        return await self._picture(request, lambda ready, place: ready.patches.context(place))

    async def slide(self, request: Request) -> Response:
        return await self._picture(request, lambda ready, _: ready.thumbnail_HWC)

    async def save(self, request: Request) -> Response:
        asked = await posted_json(request, LabelsRequest)
        self._check_session(asked.session, "NOT saved")
        labels = [one.as_label(self._posted_place(one.patch)) for one in asked.labels]
        reasons = {label.place: one.reason for label, one in zip(labels, asked.labels, strict=True)}
        excluded = [self._posted_place(patch) for patch in asked.excluded]

        def work() -> None:
            if labels:
                self._desk.session.save(labels, reasons, asked.order, again=asked.again)
            self._desk.session.exclude(excluded)

        await self._run(work)
        return await self._state()

    async def undo(self, request: Request) -> Response:
        asked = await posted_json(request, UndoRequest)
        self._check_session(asked.session, "NOT undone")
        undone = await self._run(lambda: self._desk.session.undo_only(asked.last))
        if undone is None and self._is_opening():
            raise HTTPException(503, "NOT undone: wsi-label is still opening the slides. Press z again in a moment.")
        if undone is None:
            raise HTTPException(409, "NOT undone: your last label was made in another tab. Reload this page to see it.")
        return await self._state(undone)

    async def suggestion(self, request: Request) -> Response:
        """Respond with the model's probabilities for the classes of the same name."""
        asked = await posted_json(request, PatchRequest)
        place = self._place(asked.patch)
        model = self._desk.model
        if model is None:
            raise HTTPException(409, "No model was given. Start wsi-label with --model.")
        if self._desk.session.patch(place, "random").blind:
            raise HTTPException(409, "This patch is blind: it never shows a suggestion.")
        presence_K = (await self._run(lambda: model.see(self._desk.slides.pixels([place])))).presence_NK[0]
        by_name = {one.name: float(p) for one, p in zip(model.card.classes, presence_K, strict=True)}
        shown = {one.id: round(by_name[one.name], 3) for one in self._desk.session.classes() if one.name in by_name}
        return JSONResponse({"model": model.card.name, "suggested": shown})

    async def grid(self, request: Request) -> Response:
        """Respond with the patches most similar to those with a class, or with how many are still compared."""
        asked = await posted_json(request, GridRequest)
        return JSONResponse(await self._run(lambda: self._grid(asked.class_id)))

    def _grid(self, class_id: int) -> dict[str, object]:
        session, similar = self._desk.session, self._desk.similar
        if class_id not in {one.id for one in session.classes()}:
            raise HTTPException(409, "This class does not exist; reload the page.")
        answered = session.answered(class_id)
        present, absent = answered["present"][-POOL:], answered["absent"][-POOL:]
        if not present:
            return {"missing": 0, "patches": [], "why": "First label a patch with this class in the single view."}
        unseen = [place for place, _ in zip(session.unseen(), range(POOL), strict=False)]
        missing = similar.prepare([*present, *absent, *unseen])
        if similar.error is not None:
            return {"missing": 0, "patches": [], "why": similar.error}
        if missing:
            return {"missing": missing, "of": len(present) + len(absent) + len(unseen), "patches": []}
        best = similar.ranked(unseen, present, absent)[:GRID]
        why = "" if best else "Nothing left: every patch of the open slides has a label or is blind."
        return {"missing": 0, "patches": [self._facts(session.patch(place, "similar")) for place in best], "why": why}

    async def _state(self, undone: list[Patch] | None = None) -> Response:
        return JSONResponse(await self._run(lambda: self._all(undone or [])))

    def _all(self, undone: list[Patch]) -> dict[str, object]:
        session, slides = self._desk.session, self._desk.slides
        upcoming = session.upcoming()
        counts = session.counts()
        return {
            "session": session.id,
            "annotator": session.annotator,
            "model": None if self._desk.model is None else self._desk.model.card.name,
            "classes": [
                {"id": one.id, "name": one.name, "color": "#{:02x}{:02x}{:02x}".format(*one.color),
                 "present": counts.present[one.id]}
                for one in session.classes()
            ],
            "counts": {"labeled": counts.labeled, "incomplete": counts.incomplete, "unsure": counts.unsure,
                       "artifact": counts.artifact},
            "slides": [
                {"name": one.title, "labeled": counts.by_slide.get(one.added.digest, 0), "patches": len(one.order)}
                for one in slides.ready()
            ],
            "opening": slides.count - slides.opened(),
            "seconds": session.median_seconds(),
            "upcoming": [self._facts(one) for one in upcoming],
            "history": [self._facts(one) for one in session.history()],
            "undone": [self._facts(one) for one in undone],
            "last": session.last(),
        }  # fmt: skip

    def _facts(self, patch: Patch) -> dict[str, object]:
        ready = self._desk.slides.of(patch.place)
        assert ready is not None  # only patches of open slides are handed out
        (width, height), side = ready.patches.size_l0, ready.patches.side_l0
        place = patch.place
        return {
            "id": place.id,
            "slide": ready.title,
            "digest": place.slide,
            "reason": patch.reason,
            "blind": patch.blind,
            "micrometers": round(place.side * place.mpp),
            # Shares of the thumbnail.
            "at": [place.x_l0 / width, place.y_l0 / height, side / width, side / height],
            "label": None if patch.label is None else _label(patch.label),
        }

    async def _picture(self, request: Request, make: Callable[..., NDArray[np.uint8]]) -> Response:
        place = self._place(request.path_params["id"])
        key = (place.slide if request.url.path.endswith("/slide.jpg") else place.id, request.url.path[-9:])

        def work() -> bytes:
            ready = self._desk.slides.of(place)
            if ready is None:
                raise HTTPException(404)
            with self._desk.slides.reading(ready):
                rgb_HWC = make(ready, place)
            return _jpeg(rgb_HWC)

        made = self._cache.peek(key)
        if made is None:
            made = await self._run(work, self._pictures)
            self._cache.put(key, made)
        return Response(made, media_type="image/jpeg")

    def _place(self, patch_id: str, unknown: str = "This patch is unknown; reload the page.") -> Place:
        """Return a patch. Raise HTTPException with the text `unknown` if no open slide contains it."""
        place = self._desk.session.place(patch_id)
        if place is None:
            if self._is_opening():
                raise HTTPException(503, "wsi-label is still opening the slides.")
            raise HTTPException(404, unknown)
        return place

    def _posted_place(self, patch_id: str) -> Place:
        """Return a patch to save. A page can outlive its server, and the next one may have other slides."""
        return self._place(
            patch_id,
            "NOT saved: the slide of this patch is not open. Stop wsi-label and start it with this slide on the same "
            "port.",
        )

    def _check_session(self, asked: str, failed: str) -> None:
        """Raise HTTPException for a page of another labels folder or annotator, whose server has ended."""
        if asked not in ("", self._desk.session.id):
            raise HTTPException(
                409,
                f"{failed}: wsi-label now runs with another labels folder or annotator than this page. Stop it, "
                "and start it with those of this page on the same port.",
            )

    def _is_opening(self) -> bool:
        """Return whether slides are still being opened, because a page can outlive its server."""
        return self._desk.slides.opened() < self._desk.slides.count

    async def _run(self, work: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._work, work)
        except LabelingError as error:
            log.error("%s", error)
            raise HTTPException(507, "NOT saved; see the terminal for the reason.") from error
        except (WsiSegmentError, OSError) as error:
            log.error("%s", error)
            raise HTTPException(503, "The slide or the model cannot be read; see the terminal.") from error


def _label(label: Labeled) -> dict[str, object]:
    return {"present": [id_ for id_, answer in label.answers.items() if answer == "present"], "mark": label.mark}


def _jpeg(rgb_HWC: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb_HWC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
