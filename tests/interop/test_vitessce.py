"""The stored map in Vitessce (whose image layers are Viv's), in a real browser, compared pixel by pixel."""

from __future__ import annotations

import functools
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser import FLAGS, capture, chromium, screenshot, watch
from tests.interop.conftest import Shown
from tests.interop.vitessce import CONFIGURATION

WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""Flags for WebGL without a graphics card."""
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<div id="root" style="width: 1200px"></div><script type="module" src="/vitessce/vitessce.js"></script>"""


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Log nothing: empty chunks have no file, but the client requests them."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Yield the address of a plain server of a folder's files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def webgl_browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium: install the Debian package chromium, or set WSI_SEGMENT_CHROMIUM to its program")
    flags = [*(flag for flag in FLAGS if flag != "--disable-gpu"), *WEBGL]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def webgl_page(webgl_browser: Browser) -> Iterator[Page]:
    """Yield a page that reaches only this machine and whose errors fail the test."""
    page = webgl_browser.new_page(viewport={"width": 1200, "height": 640})
    faults = watch(page)
    yield page
    page.close()
    # An empty chunk has no file.
    assert [fault for fault in faults if "404 (File not found)" not in fault] == []


def picture(page: Page) -> NDArray[np.uint8]:
    """Return Vitessce's view of the image, as rgb_HWC."""
    return np.asarray(Image.open(io.BytesIO(capture(page.locator("canvas").first))).convert("RGB"))


def box_of(rgb_HWC: NDArray[np.uint8], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the long runs of a color, without the letters of a legend."""
    hit_HW = np.abs(rgb_HWC.astype(int) - color).max(axis=2) <= 2
    rows, columns = (np.flatnonzero(hit_HW.sum(axis=axis) > 30) for axis in (1, 0))
    if len(rows) == 0 or len(columns) == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def settled(page: Page, color: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return the picture once it contains the color and no longer changes."""
    deadline = time.monotonic() + 40
    before = picture(page)
    while time.monotonic() < deadline:
        page.wait_for_timeout(700)
        after = picture(page)
        if box_of(after, color)[2] > 0 and np.array_equal(before, after):
            return after
        before = after
    pytest.fail(f"Vitessce did not show {color} within 40 s; it shows {np.unique(before.reshape(-1, 3), axis=0)[:20]}")


@pytest.mark.full
def test_vitessce_shows_each_class_in_its_color_and_place(
    shown: Shown, vitessce: Path, webgl_page: Page, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "vitessce").symlink_to(vitessce)
    (tmp_path / "map").symlink_to(shown.store.parent)
    with serving(tmp_path) as address:
        file = {"fileType": "image.ome-zarr", "url": f"{address}/map/{shown.store.name}"}
        config = CONFIGURATION | {"datasets": [{"uid": "A", "name": "slide", "files": [file]}]}
        webgl_page.goto(address)
        webgl_page.wait_for_function("window.show !== undefined")
        webgl_page.evaluate("config => window.show(config)", config)
        try:
            rgb_HWC = settled(webgl_page, shown.colors[0])
        finally:
            screenshot(webgl_page, f"vitessce-{len(shown.colors)}-classes", tmp_path)
            webgl_page.goto("about:blank")  # stop requests before the server ends
    (x, y, width, height), _ = shown.regions[0]
    left, top, right, bottom = box_of(rgb_HWC, shown.colors[0])
    l0_per_px = width / (right - left)
    assert height / (bottom - top) == pytest.approx(l0_per_px, rel=0.02)
    palette = ((0, 0, 0), *shown.colors)
    compared = [0] * len(palette)
    # Sample points a hundredth of the slide apart, away from borders, which may be a pixel off.
    for across in np.linspace(0.005, 0.995, 100):
        for down in np.linspace(0.005, 0.995, 100):
            x_l0, y_l0 = across * shown.size_l0[0], down * shown.size_l0[1]
            slack = 2 * l0_per_px
            labels = {shown.label_at(x_l0 + dx, y_l0 + dy) for dx in (-slack, slack) for dy in (-slack, slack)}
            row, column = round(top + (y_l0 - y) / l0_per_px), round(left + (x_l0 - x) / l0_per_px)
            if len(labels) == 1 and 0 <= row < rgb_HWC.shape[0] and 0 <= column < rgb_HWC.shape[1]:
                (label,) = labels
                found = rgb_HWC[row, column].astype(int)
                # Legend, scale bar and buttons cover parts of the background.
                if label or not found.any():
                    assert np.abs(found - palette[label]).max() <= 2, (x_l0, y_l0, found, palette[label])
                    compared[label] += 1
    assert min(compared) > 100, compared
    assert compared[0] > 2000, compared
