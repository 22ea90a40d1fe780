"""Tests of the overview that the viewer makes of a slide without small levels."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.slide.recipe import segment_slide
from pipeline.viewing.viewer import slide_tiles
from pipeline.viewing.viewer.overview import UNREAD, Overview
from pipeline.viewing.viewer.results import Result, find_results
from pipeline.viewing.viewer.slide_tiles import SlideTiles
from tests.browser import capture, until
from tests.pipeline.fakes import SMALL, color_predictor
from tests.pipeline.viewing.viewer.conftest import Site, serving, textured
from tests.slides import reduce, write_slide
from wsi.box import Box
from wsi.errors import SlideReadError
from wsi.slide import Slide, open_slide

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

SIZE = (2560, 1664)
LEVEL = 2
"""The finest of four zoom levels that comes from the overview, which is read in 5×4 pieces."""
PIECES = 20


class Gate:
    """Limits how many pieces of an overview can be read. If `broken` is set, the next read fails."""

    def __init__(self, pixels: Callable[[SlideTiles, int, Box], NDArray[np.uint8]]) -> None:
        self._pixels = pixels
        self._allowed = threading.Semaphore(0)
        self.broken = False

    def open(self, pieces: int) -> None:
        self._allowed.release(pieces)

    def pixels(self, tiles: SlideTiles, level: int, box_z: Box) -> NDArray[np.uint8]:
        if threading.current_thread().name == "overview":
            self._allowed.acquire(timeout=10)  # a failed test must end
            if self.broken:
                raise SlideReadError("a.svs: cannot be read")
        return self._pixels(tiles, level, box_z)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Return a gate for slides of SIZE, which get an overview here."""
    gate = Gate(SlideTiles.pixels)

    def pixels(tiles: SlideTiles, level: int, box_z: Box) -> NDArray[np.uint8]:
        return gate.pixels(tiles, level, box_z)

    monkeypatch.setattr(slide_tiles, "PIECE_PX", 512)
    monkeypatch.setattr(slide_tiles, "ON_DEMAND_PX", 1000**2)
    monkeypatch.setattr(slide_tiles, "OVERVIEW_PX", 800)
    monkeypatch.setattr(SlideTiles, "pixels", pixels)
    yield gate
    gate.open(PIECES)


@pytest.fixture
def slide(tmp_path: Path) -> Iterator[Slide]:
    with open_slide(write_slide(tmp_path / "a.svs", textured(SIZE)), 1.0) as opened:
        yield opened


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "the condition was not met within 20 s"
        time.sleep(0.01)


def picture(jpeg: bytes | None) -> NDArray[np.int16]:
    assert jpeg is not None
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(np.int16)


def test_read_pieces_are_shown_and_unread_pieces_are_gray(gate: Gate, slide: Slide) -> None:
    tiles = SlideTiles(slide)
    assert (tiles.levels, tiles.overview_level) == (4, LEVEL)
    overview = Overview(tiles, LEVEL, "a")
    gate.open(10)  # the upper two rows of four
    wait_until(lambda: overview.share == 0.5)
    expected_HWC = reduce(textured(SIZE), 8)
    seen_HWC = picture(overview.jpeg(3, 0, 0))
    assert seen_HWC.shape == (208, 320, 3)
    assert np.abs(seen_HWC[:120] - expected_HWC[:120]).mean() < 3
    assert np.abs(seen_HWC[136:] - UNREAD).max() < 3
    gate.open(10)
    wait_until(lambda: overview.share == 1)
    assert np.abs(picture(overview.jpeg(3, 0, 0)) - expected_HWC).mean() < 3
    assert np.abs(picture(overview.jpeg(LEVEL, 1, 0)) - reduce(textured(SIZE), 4)[:, 512:]).mean() < 3
    assert not overview.failed
    overview.close()
    for place in ((1, 0, 0), (LEVEL, 2, 0), (LEVEL, 0, 1), (4, 0, 0)):
        assert overview.jpeg(*place) is None
    # Tiles that need the whole slide come only from the overview. All other tiles are read on request.
    assert tiles.jpeg(LEVEL, 0, 0) is None
    assert tiles.jpeg(3, 0, 0) is None
    assert tiles.jpeg(1, 0, 0) is not None


def test_slides_with_small_levels_get_no_overview(gate: Gate, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "b.svs", textured(SIZE), levels=(1, 4))
    with open_slide(path, 1.0) as slide:
        assert SlideTiles(slide).overview_level is None


def test_closing_an_overview_waits_for_the_current_read(gate: Gate, slide: Slide) -> None:
    overview = Overview(SlideTiles(slide), LEVEL, "a")
    gate.open(3)
    wait_until(lambda: overview.share == 3 / PIECES)
    closing = threading.Thread(target=overview.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()  # a piece is being read
    gate.open(1)
    closing.join(20)
    assert not closing.is_alive()
    assert overview.share == 4 / PIECES


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return the result of a slide with one level."""
    folder = tmp_path_factory.mktemp("overview")
    segment_slide(write_slide(folder / "a.svs", textured(SIZE), mpp=1.0), folder / "results", color_predictor(), SMALL)
    return find_results(folder / "results")[0]


def progress(site: Site) -> dict[str, object]:
    answer: dict[str, object] = json.loads(site.get("overview.json").body)
    return answer


def test_the_server_reports_progress_and_does_not_cache_incomplete_tiles(gate: Gate, result: Result) -> None:
    with serving((result,)) as site:
        assert json.loads(site.get("facts.json").body)["slide"]["overview"] == LEVEL
        assert progress(site) == {"share": 0.0, "failed": False}
        assert site.get("slide/3/0_0.jpg").status == 404
        gray = site.get("overview/3/0_0.jpg?read=0")
        assert gray.headers["content-type"] == "image/jpeg"
        assert np.abs(picture(gray.body) - UNREAD).max() < 3
        gate.open(PIECES)
        wait_until(lambda: progress(site) == {"share": 1.0, "failed": False})
        assert np.abs(picture(site.get("overview/3/0_0.jpg?read=0").body) - reduce(textured(SIZE), 8)).mean() < 3


def test_a_slide_with_small_levels_has_no_overview_address(site: Site) -> None:
    assert site.get("overview.json").status == 404
    assert site.get("overview/1/0_0.jpg").status == 404


SHOWN = """[...document.querySelectorAll("#notes p")].map((p) => p.textContent).join("|")"""


def center_color(page: Page) -> list[int]:
    """Return the color of the pixel at the center of the stage."""
    box = page.locator("#stage").bounding_box()
    assert box is not None
    clip = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "width": 1, "height": 1}
    shot = Image.open(io.BytesIO(capture(page, clip=clip)))
    return [int(value) for value in np.asarray(shot.convert("RGB"))[0, 0]]


@pytest.mark.full
def test_the_page_shows_the_overview_while_it_is_read(gate: Gate, result: Result, page: Page) -> None:
    with serving((result,)) as site:
        page.goto(f"{site.page}#x=1280&y=832&zoom=0.2&map=0&outlines=0")
        until(page, f'{SHOWN}.startsWith("This slide contains no overview")')
        until(page, "wsiView.osd.world.getItemAt(0)?.getFullyLoaded()")
        page.wait_for_timeout(200)
        assert center_color(page) == pytest.approx([UNREAD] * 3, abs=3)
        gate.open(PIECES)
        until(page, f'{SHOWN} === "" && wsiView.osd.world.getItemAt(0).getFullyLoaded()')
        page.wait_for_timeout(200)
        seen, unread = center_color(page), [UNREAD] * 3
        assert seen == pytest.approx([int(value) for value in reduce(textured(SIZE), 4)[208, 320]], abs=30)
        assert seen != pytest.approx(unread, abs=10)
        page.goto("about:blank")


@pytest.mark.full
def test_page_and_log_report_an_unreadable_overview(
    gate: Gate, result: Result, page: Page, caplog: pytest.LogCaptureFixture
) -> None:
    gate.broken = True
    gate.open(1)
    with serving((result,)) as site:
        page.goto(site.page)
        until(page, f'{SHOWN}.startsWith("The overview of this slide cannot be read")')
        page.goto("about:blank")
    assert "a: the overview cannot be read: a.svs: cannot be read" in caplog.text
