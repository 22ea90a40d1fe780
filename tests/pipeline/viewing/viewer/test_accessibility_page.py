"""The page for people who use a screen reader, the keyboard, forced colors or reduced motion, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import audited_page, axe_findings, screenshot, until, watched_page
from tests.cases import full
from tests.pipeline.fakes import COLORS
from tests.pipeline.viewing.viewer.conftest import Site
from tests.pipeline.viewing.viewer.screen import PURPLE_AT, settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page


@pytest.mark.full
def test_nothing_moves_slowly_for_people_who_prefer_reduced_motion(browser: Browser, site: Site) -> None:
    with watched_page(browser, reduced_motion="reduce") as page:
        show(page, site)
        before = page.evaluate("() => wsiView.view().zoom")
        page.keyboard.press("+")
        page.wait_for_timeout(50)
        assert page.evaluate("() => [wsiView.view().zoom / wsiView.view(false).zoom, wsiView.osd.isAnimating()]") == [
            pytest.approx(1), False
        ]  # fmt: skip
        assert page.evaluate("() => wsiView.view().zoom") == pytest.approx(before * 1.5, rel=0.02)


@pytest.mark.full
def test_the_focus_stays_near_a_button_that_disappears(own_site: Site, page: Page) -> None:
    focused = "() => document.activeElement.id || document.activeElement.className"
    show(page, own_site)
    page.keyboard.press("c")
    page.keyboard.press("n")
    until(page, "document.querySelector('.relabel').ariaDisabled === 'false'")
    page.locator(".relabel").first.focus()
    page.keyboard.press("Escape")
    until(page, "document.querySelector('.relabel').ariaDisabled === 'true'")
    assert page.evaluate(focused) == "relabel"
    page.keyboard.press("Escape")
    assert page.locator("#correction-tools").is_hidden()
    assert page.evaluate(focused) == "correcting"
    for measuring, expected in ((True, "openseadragon-canvas"), (False, "measure-distance")):
        page.locator("#stage .openseadragon-canvas").first.focus()
        page.keyboard.press("d")
        page.keyboard.press("Space")
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(600)
        page.keyboard.press("Space")
        if not measuring:
            page.keyboard.press("d")
        page.locator("#measure-clear").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == expected
        page.keyboard.press("Escape")


@pytest.mark.full
def test_the_class_at_the_center_is_announced_without_outlines(shared_page: Page, site: Site) -> None:
    show(shared_page, site, f"#x={PURPLE_AT[0]}&y={PURPLE_AT[1]}&zoom=1")
    shared_page.keyboard.press("o")
    shared_page.keyboard.press("i")
    until(shared_page, "document.getElementById('announcement').textContent.includes('mm²')")


@pytest.mark.full
def test_arrow_keys_move_a_focused_slider_and_not_the_slide(shared_page: Page, site: Site) -> None:
    show(shared_page, site)
    before = shared_page.evaluate("() => wsiView.view().x")
    shared_page.get_by_label("Opacity of the class map").focus()
    shared_page.keyboard.press("ArrowRight")
    shared_page.wait_for_timeout(600)
    assert shared_page.evaluate("() => wsiView.controls.state.map.opacity") == pytest.approx(0.5)
    assert shared_page.evaluate("() => wsiView.view().x") == pytest.approx(before)


@pytest.mark.parametrize("scheme", ["light", full("dark")])
@pytest.mark.parametrize("width", [full(1280), 390])
def test_it_is_accessible_in_both_schemes_and_on_a_phone(
    browser: Browser, site: Site, tmp_path: Path, scheme: str, width: int
) -> None:
    with audited_page(browser, scheme, width=width, height=800) as page:
        show(page, site)
        if width == 390:
            page.locator("summary").click()
        page.get_by_role("checkbox", name=re.compile("Probabilities")).check()
        settle(page)
        assert axe_findings(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        screenshot(page, f"viewer-{scheme}-{width}", tmp_path, whole=False)
        page.get_by_role("button", name="?").click()
        assert axe_findings(page) == []
        stage = page.locator("#stage").bounding_box()
        assert stage is not None
        assert stage["height"] > 300


@pytest.mark.full
def test_forced_colors_keep_swatches_crosshair_and_pressed_buttons_and_a_low_window_keeps_the_zoom_buttons(
    browser: Browser, site: Site
) -> None:
    color = "(one, part) => getComputedStyle(one, part || null).backgroundColor"
    with watched_page(browser, forced_colors="active") as page:
        show(page, site)
        page.keyboard.press("d")
        swatches = page.locator("#classes .swatch").evaluate_all(
            "(all) => all.map((one) => getComputedStyle(one).borderColor)"
        )
        assert swatches == ["rgb({}, {}, {})".format(*color_) for color_ in COLORS[:2]]
        assert page.locator("#crosshair").evaluate(color, "::before") == "rgb(255, 255, 255)"
        pressed, other = (page.locator(f"#measure-{kind}").evaluate(color) for kind in ("distance", "area"))
        assert pressed != other
        page.set_viewport_size({"width": 320, "height": 256})
        page.wait_for_timeout(500)
        for name in ("zoom-in", "zoom-out", "home"):
            assert page.locator(f"#{name}").evaluate(
                """(one) => { const { left, top, width, height } = one.getBoundingClientRect();
                return one.contains(document.elementFromPoint(left + width / 2, top + height / 2)); }"""
            ), name
        zoom, foot = page.locator("#zoom").bounding_box(), page.locator("#foot").bounding_box()
        assert zoom is not None
        assert foot is not None
        assert zoom["y"] + zoom["height"] <= foot["y"]
