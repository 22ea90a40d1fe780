"""The web application: pages, tiles and outlines of results. Only corrections are written, beside the results.

The names in an address are looked up among the results found at the start, and never become part of a path. Slides are
patient data: the browser stores nothing, other sites cannot embed a response, and no response contains a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from pathlib import Path

import jinja2
from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.pages.page import area_text
from pipeline.viewing.viewer.corrections import CorrectionPages
from pipeline.viewing.viewer.identity import in_daemon, is_segmented_slide
from pipeline.viewing.viewer.open_results import OpenResult, OpenResults
from pipeline.viewing.viewer.page_facts import page_facts
from pipeline.viewing.viewer.replaced import current, requested_result
from pipeline.viewing.viewer.results import FileStamp, Result, slide_file_stamp
from pipeline.web.application import local_application
from pipeline.web.cache import ByteCache
from pipeline.web.request_threads import RequestThreads
from wsi.errors import WsiSegmentError

log = logging.getLogger(__name__)

CACHE_BYTES = 192 << 20
ASSET_TYPES = {".css": "text/css", ".js": "text/javascript"}

Make = Callable[[OpenResult], bytes | None]


class _Number(IntegerConvertor):
    """A whole number in an address, with at most as many digits as a set of 255 classes needs."""

    regex = "[0-9]{1,77}"


register_url_convertor("number", _Number())


def make_app(results: Sequence[Result], author: str) -> Starlette:
    """Return the application that shows these results. It opens a slide at the first request.

    Corrections are saved under the name of their `author`.
    """
    viewer = Viewer(results, author)
    page = "/slides/{id}/"
    here = "/slides/{id}/{version}"
    routes = [
        Route("/", viewer.index),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/assets/{name}", viewer.asset),
        Route(page, viewer.page),
        Route(f"{here}/facts.json", viewer.facts),
        Route(f"{here}/identity.json", viewer.identity),
        Route(f"{here}/slide/{{level:number}}/{{column:number}}_{{row:number}}.jpg", viewer.slide_tile),
        Route(f"{here}/overview/{{level:number}}/{{column:number}}_{{row:number}}.jpg", viewer.overview_tile),
        Route(f"{here}/overview.json", viewer.overview),
        Route(
            f"{here}/class/{{channel:number}}/{{level:number}}/{{column:number}}_{{row:number}}.png", viewer.class_tile
        ),
        Route(
            f"{here}/labels/{{shown:number}}/{{level:number}}/{{column:number}}_{{row:number}}.png", viewer.label_tile
        ),
        Route(f"{here}/outlines/{{detail:number}}", viewer.outlines),
        Route(f"{here}/left-out/outlines/{{detail:number}}", viewer.left_out),
        Route(f"{here}/values/{{x:number}}_{{y:number}}.json", viewer.values),
        Route(f"{here}/uncertainty", viewer.uncertainty),
        Route(f"{here}/regions.geojson", viewer.regions),
        Route(f"{here}/familiarity.png", viewer.familiarity),
        Route(f"{here}/thumbnail.jpg", viewer.thumbnail),
        *viewer.corrections.routes(here),
    ]
    return local_application(routes, viewer.lifespan)


class Viewer:
    """The responses of the routes, and the threads that make them."""

    def __init__(self, results: Sequence[Result], author: str) -> None:
        self._cache = ByteCache(CACHE_BYTES)
        self._opened = OpenResults(results)
        self.corrections = CorrectionPages(self._opened.by_id, author)
        # Few threads, and always the same ones: each keeps a handle of every slide.
        self._tile_threads = RequestThreads("tiles", max(2, min(8, os.cpu_count() or 2)))
        # Hundreds of thousands of polygons take seconds, and tiles must not wait for them.
        self._outline_thread = RequestThreads("outlines", 1)
        self._identities: dict[tuple[str, FileStamp | None], asyncio.Task[bool | None]] = {}
        self._assets = _read_assets()
        self._pages = jinja2.Environment(
            # The second folder has the parts that these pages share with the report.
            loader=jinja2.ChoiceLoader(
                [
                    jinja2.PackageLoader("pipeline.viewing.viewer", "assets"),
                    jinja2.PackageLoader("pipeline.pages", "templates"),
                ]
            ),
            autoescape=True,
        )
        self._pages.filters["area"] = area_text

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        for threads in (self._tile_threads, self._outline_thread):
            threads.shutdown()
        self.corrections.close()
        self._opened.close()

    async def index(self, _: Request) -> Response:
        results = tuple(self._opened.by_id.values())
        if len(results) == 1:
            return RedirectResponse(f"/slides/{results[0].id}/")
        models = sorted({(one.run.model, one.run.scope, one.run.limits) for one in results if one.run.limits})
        return HTMLResponse(self._pages.get_template("slides.html").render(results=results, models=models))

    async def page(self, request: Request) -> Response:
        results = tuple(self._opened.by_id.values())
        return HTMLResponse(
            self._pages.get_template("viewer.html").render(
                result=self._result(request), results=results, author=self.corrections.author
            )
        )

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            raise HTTPException(404)
        return Response(self._assets[name], media_type=ASSET_TYPES[Path(name).suffix])

    async def facts(self, request: Request) -> Response:
        return await self._answer(request, "application/json", _facts, keep=False)

    async def identity(self, request: Request) -> Response:
        """Respond whether the slide's file has the bytes that were segmented; null if it cannot be read."""
        result = self._result(request)
        key = (result.id, slide_file_stamp(result.slide))
        if key not in self._identities:
            self._identities[key] = asyncio.create_task(in_daemon(lambda: is_segmented_slide(result)))
        task, same = self._identities[key], None
        try:
            same = await asyncio.shield(task)
        finally:
            if same is None and task.done():  # it failed: try again at the next request
                self._identities.pop(key, None)
        return JSONResponse({"same": same})

    async def slide_tile(self, request: Request) -> Response:
        level, column, row = (request.path_params[n] for n in ("level", "column", "row"))
        return await self._answer(request, "image/jpeg", lambda o: o.slide_tiles.jpeg(level, column, row))

    async def overview_tile(self, request: Request) -> Response:
        level, column, row = (request.path_params[n] for n in ("level", "column", "row"))

        def make(opened: OpenResult) -> bytes | None:
            return None if opened.overview is None else opened.overview.jpeg(level, column, row)

        # Not cached: the next one may show more, and re-encoding is cheap.
        return await self._answer(request, "image/jpeg", make, keep=False)

    async def overview(self, request: Request) -> Response:
        return await self._answer(request, "application/json", _progress, keep=False)

    async def class_tile(self, request: Request) -> Response:
        place = tuple(request.path_params[n] for n in ("channel", "level", "column", "row"))
        return await self._answer(request, "image/png", lambda o: o.map_tiles.probability(*place))

    async def label_tile(self, request: Request) -> Response:
        place = tuple(request.path_params[n] for n in ("shown", "level", "column", "row"))
        return await self._answer(request, "image/png", lambda o: o.map_tiles.labels(*place))

    async def outlines(self, request: Request) -> Response:
        return await self._drawn(request, OpenResult.outlines)

    async def left_out(self, request: Request) -> Response:
        return await self._drawn(request, OpenResult.left_out)

    async def uncertainty(self, request: Request) -> Response:
        made = await self._made(request, request.url.path, OpenResult.uncertainty, self._outline_thread)
        return Response(made, media_type="application/octet-stream")

    async def values(self, request: Request) -> Response:
        """Respond with the label and the probabilities that a pixel of the map stores."""
        x, y = request.path_params["x"], request.path_params["y"]
        return await self._answer(request, "application/json", lambda o: _values(o, x, y), keep=False)

    async def regions(self, request: Request) -> Response:
        """Respond with the regions of these `numbers` as GeoJSON for QuPath."""
        asked = request.query_params.get("numbers", "")
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", asked, re.ASCII):
            raise HTTPException(404)
        numbers = frozenset(map(int, asked.split(",")))
        made = await self._made(request, None, lambda o: o.regions(numbers), self._outline_thread)
        return Response(made, media_type="application/geo+json")

    async def familiarity(self, request: Request) -> Response:
        return await self._file(request, "image/png", self._result(request).familiarity)

    async def thumbnail(self, request: Request) -> Response:
        return await self._file(request, "image/jpeg", self._result(request).thumbnail)

    async def _file(self, request: Request, media_type: str, file: Path | None) -> Response:
        """Respond with a file of a result. The slide stays closed."""
        if file is None:
            raise HTTPException(404)
        content = await self._run(request, file.read_bytes, self._tile_threads)
        return Response(content, media_type=media_type)

    def _result(self, request: Request) -> Result:
        return requested_result(request, self._opened.by_id)

    async def _drawn(self, request: Request, polygons: Callable[[OpenResult, int], bytes | None]) -> Response:
        detail = request.path_params["detail"]
        answer = await self._made(request, request.url.path, lambda o: polygons(o, detail), self._outline_thread)
        return Response(answer, media_type="application/octet-stream")

    async def _answer(self, request: Request, media_type: str, make: Make, *, keep: bool = True) -> Response:
        key = request.url.path if keep else None
        return Response(await self._made(request, key, make, self._tile_threads), media_type=media_type)

    async def _made(self, request: Request, key: str | None, make: Make, threads: RequestThreads) -> bytes:
        """Return the value of `make`, cached under `key`. Raises HTTPException 404 if the value is None."""
        result = self._result(request)
        kept = None if key is None else self._cache.peek(key)
        if kept is not None:
            return kept
        made = await self._run(request, lambda: self._work(result, make), threads)
        if made is None:
            raise HTTPException(404)
        if key is not None:
            self._cache.put(key, made)
        return made

    async def _run(self, request: Request, work: Callable[[], bytes | None], threads: RequestThreads) -> bytes | None:
        """Return the value of `work`.

        Raises HTTPException 409 if the result was replaced, and 503 if a file cannot be read.
        """
        result = self._result(request)

        def checked() -> bytes | None:
            with current(result):
                return work()

        try:
            return await threads.run(request, checked)
        except (WsiSegmentError, OSError) as error:
            log.error("%s: %s", result.name, error)
            raise HTTPException(
                503, "The slide or its result cannot be read; see the terminal for the reason."
            ) from error

    def _work(self, result: Result, make: Make) -> bytes | None:
        with self._opened.using(result) as opened:
            return make(opened)


def _facts(opened: OpenResult) -> bytes:
    return json.dumps(page_facts(opened)).encode()


def _values(opened: OpenResult, x: int, y: int) -> bytes | None:
    values = opened.map_tiles.values(x, y)
    return None if values is None else json.dumps({"label": values[0], "probabilities": values[1]}).encode()


def _progress(opened: OpenResult) -> bytes | None:
    """Return the share of the overview that has been read, and whether reading failed; None if there is no overview."""
    if opened.overview is None:
        return None
    return json.dumps({"share": opened.overview.share, "failed": opened.overview.failed}).encode()


def _read_assets() -> dict[str, bytes]:
    package = resources.files("pipeline.viewing.viewer")
    files = (file for folder in ("assets", "openseadragon") for file in (package / folder).iterdir())
    return {file.name: file.read_bytes() for file in files if Path(file.name).suffix in ASSET_TYPES}
