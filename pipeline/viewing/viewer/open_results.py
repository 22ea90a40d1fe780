"""The open results of the viewer: opened at the first request, the least recently used one closed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import MapFileError, ViewError
from pipeline.formats.features import geojson_feature, geojson_text, read_features
from pipeline.results.digests import missing_map_files
from pipeline.viewing.viewer.map_tiles import MapTiles
from pipeline.viewing.viewer.outlines import left_out_bytes, outline_bytes
from pipeline.viewing.viewer.overview import Overview
from pipeline.viewing.viewer.results import Result, examined
from pipeline.viewing.viewer.slide_tiles import SlideTiles
from pipeline.viewing.viewer.uncertainty import MOST_PIXELS, uncertainties
from wsi.errors import WsiSegmentError
from wsi.paths import kind_of
from wsi.slide import Slide, open_slide

MOST_OPEN = 4
"""Slides that stay open. Each has a handle for every thread."""


class OpenResult:
    """A result with its slide and its map open. Threads may share it."""

    def __init__(self, result: Result) -> None:
        self.result = result
        _check_map(result)
        # Before the slide: MapTiles keeps no file open, so nothing leaks if the slide cannot be opened.
        self.map_tiles = MapTiles(result.store, [one.color for one in result.run.classes])
        self._slide = open_checked(result)
        self.slide_tiles = SlideTiles(self._slide)
        level = self.slide_tiles.overview_level
        self.overview = None if level is None else Overview(self.slide_tiles, level, result.name)
        self.users = 0

    def outlines(self, detail: int) -> bytes | None:
        return outline_bytes(self.result.outlines, detail)

    def left_out(self, detail: int) -> bytes | None:
        file = self.result.left_out
        return None if file is None else left_out_bytes(file, detail)

    def uncertainty(self) -> bytes:
        """Return the uncertainty of each region in the order of `outlines`, as little-endian 32-bit floats."""
        features = list(read_features(self.result.outlines, self.result.run.classes))
        probs_CHW, scale = self.map_tiles.whole(MOST_PIXELS)
        l0_per_px = self.result.run.plan.grid.l0_per_out * scale
        return uncertainties(features, probs_CHW, l0_per_px).astype("<f4").tobytes()

    def regions(self, numbers: frozenset[int]) -> bytes | None:
        """Return the regions with these numbers, in the order of `outlines`, as the result's GeoJSON has them.

        Return None if any of the numbers belongs to no region.
        """
        features = read_features(self.result.outlines, self.result.run.classes)
        chosen = [feature for number, feature in enumerate(features) if number in numbers]
        return "".join(geojson_text(map(geojson_feature, chosen))).encode() if len(chosen) == len(numbers) else None

    def close(self) -> None:
        if self.overview is not None:
            self.overview.close()
        self._slide.close()


class OpenResults:
    """The open results among all that are shown. Threads may share it. Call `close` when no result is in use."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.by_id = {result.id: result for result in results}
        self._open: OrderedDict[str, OpenResult] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def using(self, result: Result) -> Iterator[OpenResult]:
        """Yield the open result. Raises ViewError, MapFileError or SlideError if it cannot be opened."""
        with self._lock:
            opened = self._open.get(result.id)
            if opened is None:
                opened = self._open[result.id] = OpenResult(result)
            self._open.move_to_end(result.id)
            opened.users += 1
            self._close_unused()
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1

    def _close_unused(self) -> None:
        idle = [id_ for id_, opened in self._open.items() if not opened.users]
        for id_ in idle[: max(0, len(self._open) - MOST_OPEN)]:
            self._open.pop(id_).close()

    def close(self) -> None:
        """Close every slide."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def _check_map(result: Result) -> None:
    """Raise MapFileError if files of the map are missing, which would be shown as areas without a class."""
    missing = missing_map_files(result.folder, result.run)
    if missing:
        raise MapFileError(
            f"{result.store}: cannot be read: {len(missing)} of its files are missing, such as {missing[0]}; segment "
            f"the slide again with --repair"
        )


def open_checked(result: Result) -> Slide:
    """Open a result's slide. Raises SlideError, or ViewError if it is missing or not the slide of the result."""
    path = result.slide
    with examined(path):
        if kind_of(path) != "file":
            raise ViewError(f"{path.name}: no such file at {path}; pass its new path with --slide")
    facts = result.run.slide
    slide = open_slide(path, facts.mpp)
    found, expected = (slide.info.size_l0, slide.info.bounds_l0), (facts.size, facts.bounds)
    if found != expected:
        slide.close()
        (width, height), (old_width, old_height) = found[0], expected[0]
        raise ViewError(
            f"{path.name}: is not the slide that {result.name} was made from: {width}×{height} px with "
            f"bounds {tuple(found[1])}, not {old_width}×{old_height} with {tuple(expected[1])}; pass --slide with the "
            f"right one"
        )
    return slide


def unavailable(result: Result) -> str | None:
    """Return why a result or its slide cannot be shown, or None if both can."""
    try:
        _check_map(result)
        open_checked(result).close()
    except WsiSegmentError as error:
        return str(error)
    return None
