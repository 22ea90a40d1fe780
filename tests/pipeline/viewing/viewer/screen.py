"""Helpers of the tests that look at the viewer in a real browser."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.browser import capture, until
from tests.pipeline.viewing.viewer.conftest import Site

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

PINK_AT, PURPLE_AT = (250, 600), (600, 400)
"""Places in level-0 pixels: in the pink region, and in the purple region inside it."""


def settle(page: Page) -> None:
    """Wait until the view stands still, and every tile and outline of it is drawn.

    OpenSeadragon starts a movement with the next frame, so `isAnimating` alone can be false just after a key press.
    """
    until(
        page,
        """window.wsiView && wsiView.osd.world.getItemCount() && !wsiView.osd.isAnimating()
        && ((v, now, then) => ['x', 'y', 'width'].every((k) => Math.abs(now[k] - then[k]) < 1e-9)
          && v.getRotation(true) === v.getRotation(false))(
            wsiView.osd.viewport, wsiView.osd.viewport.getBounds(true), wsiView.osd.viewport.getBounds(false))
        && [...Array(wsiView.osd.world.getItemCount()).keys()].every((i) => {
          const item = wsiView.osd.world.getItemAt(i); return !item.getOpacity() || item.getFullyLoaded(); })
        && (!wsiView.outlines.opacity || (wsiView.outlines.front?.final
          && wsiView.outlines.covers(wsiView.outlines.front, wsiView.view(), 1.001)))""",
    )
    page.wait_for_timeout(150)  # two frames and the address


def show(page: Page, site: Site, address: str = "") -> None:
    page.goto("about:blank")
    page.goto(f"{site.page}{address}")
    settle(page)


def said(page: Page, text: str) -> None:
    until(page, f"document.getElementById('announcement').textContent.startsWith('{text}')")


def place_on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Return the position of a level-0 place, in pixels of the window."""
    view = page.evaluate("() => { const b = document.getElementById('stage').getBoundingClientRect();"
                         " return {...wsiView.view(), left: b.left, top: b.top}; }")  # fmt: skip
    turned = np.exp(1j * np.deg2rad(view["degrees"])) * complex(x - view["x"], y - view["y"]) * view["zoom"]
    return view["left"] + view["width"] / 2 + turned.real, view["top"] + view["height"] / 2 + turned.imag


def picture(data: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def color_at(page: Page, x: float, y: float) -> NDArray[np.float64]:
    """Return the mean color of the 9×9 screen pixels around a level-0 place."""
    shot = picture(capture(page))
    left, top = (round(v) for v in place_on_screen(page, x, y))
    mean_C: NDArray[np.float64] = shot[top - 4 : top + 5, left - 4 : left + 5].mean(axis=(0, 1))
    return mean_C


def mixed(under: NDArray[np.float64], over: tuple[int, int, int], alpha: float) -> NDArray[np.float64]:
    return under * (1 - alpha) + np.array(over) * alpha
