"""Fingers and pens on the page, in a real browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.browser import until, watched_page
from tests.pipeline.viewing.viewer.conftest import Site
from tests.pipeline.viewing.viewer.screen import PINK_AT, PURPLE_AT, place_on_screen, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, CDPSession, Page


@pytest.mark.full
def test_a_tap_shows_class_and_area_until_the_slide_moves(browser: Browser, site: Site) -> None:
    with watched_page(browser, width=1000, height=700, has_touch=True) as page:
        show(page, site)
        page.touchscreen.tap(*place_on_screen(page, *PURPLE_AT))
        until(page, "!document.getElementById('tip').hidden")
        assert "mm²" in page.locator("#tip").inner_text()
        page.evaluate("() => wsiView.osd.viewport.panBy(new OpenSeadragon.Point(0.2, 0))")
        until(page, "document.getElementById('tip').hidden")


def touch(fingers: CDPSession, kind: str, *places: tuple[float, float]) -> None:
    """Send a touch event of all fingers that touch the screen."""
    points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(places)]
    fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.full
def test_a_finger_is_followed_while_the_mouse_rests_and_two_fingers_or_a_canceled_touch_are_no_tap(
    browser: Browser, site: Site
) -> None:
    with watched_page(browser, has_touch=True) as page:
        show(page, site)
        pink, purple = (place_on_screen(page, *place) for place in (PINK_AT, PURPLE_AT))
        page.mouse.move(*purple)
        until(page, "document.getElementById('values').textContent.startsWith('class-1')")
        page.touchscreen.tap(*pink)
        until(page, "document.getElementById('values').textContent.startsWith('class-0')")
        x, y = (int(v) for v in re.findall(r"[xy] (\d+)", page.locator("#place").inner_text()))
        assert [x, y] == pytest.approx(PINK_AT, abs=2)
        page.keyboard.press("a")
        fingers = page.context.new_cdp_session(page)
        touch(fingers, "touchStart", purple)
        touch(fingers, "touchStart", purple, (purple[0] + 80, purple[1]))
        touch(fingers, "touchEnd", purple)
        touch(fingers, "touchEnd")
        page.wait_for_timeout(300)
        assert page.evaluate("() => wsiView.measures.points.length") == 0
        touch(fingers, "touchStart", pink)
        touch(fingers, "touchMove", (pink[0] + 60, pink[1]))
        touch(fingers, "touchCancel")
        assert page.evaluate("() => wsiView.pointer.dragging") is False
        page.touchscreen.tap(*pink)
        until(page, "wsiView.measures.points.length === 1")


@pytest.mark.full
def test_a_pen_that_cannot_hover_shows_what_it_taps_and_does_not_zoom(page: Page, site: Site) -> None:
    show(page, site)
    zoom = page.evaluate("() => wsiView.view().zoom")
    x, y = place_on_screen(page, *PINK_AT)
    pen = page.context.new_cdp_session(page)
    for kind in ("mousePressed", "mouseReleased"):
        event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1, "pointerType": "pen"}
        pen.send("Input.dispatchMouseEvent", event)
    page.evaluate(
        "() => void wsiView.osd.canvas.dispatchEvent(new PointerEvent('pointerleave', { pointerType: 'pen' }))"
    )
    until(page, "!document.getElementById('tip').hidden")
    page.wait_for_timeout(700)  # longer than a zoom would take
    assert page.locator("#tip").inner_text().strip().startswith("class-0")
    assert page.locator("#place").inner_text().startswith("x 250, y 600 px")
    assert page.evaluate("() => wsiView.view().zoom") == zoom
