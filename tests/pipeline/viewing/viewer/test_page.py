"""Tests of the page in a real browser: positions, colors and controls."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.browser import capture, failing_page, screenshot, until
from tests.cases import full
from tests.pipeline.fakes import COLORS
from tests.pipeline.viewing.viewer.conftest import Site, textured
from tests.pipeline.viewing.viewer.screen import PINK_AT, PURPLE_AT, color_at, mixed, place_on_screen, settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

GLASS_AT = (100, 50)
"""A place on the glass, in level-0 pixels."""


def slide_color(x: int, y: int, zoom: float) -> NDArray[np.float64]:
    """Return the color that `color_at` returns there if only the slide is shown."""
    half = round(4.5 / zoom)
    mean_C: NDArray[np.float64] = textured((1280, 832))[y - half : y + half, x - half : x + half].mean(axis=(0, 1))
    return mean_C


def test_the_slide_has_its_position_and_colors(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=640&y=416&zoom=0.7&map=0&outlines=0")
    for place in (GLASS_AT, PINK_AT, PURPLE_AT, (1100, 700)):
        assert np.abs(color_at(shared_page, *place) - slide_color(*place, 0.7)).max() < 8
    # The border between glass and pink is at x = 160. A few screen pixels away, each side has its own color.
    for x, expected in ((160 - 9, GLASS_AT), (160 + 9, PINK_AT)):
        left, top = (round(v) for v in place_on_screen(shared_page, x, 416))
        shot = np.asarray(Image.open(io.BytesIO(capture(shared_page))).convert("RGB")).astype(float)
        strip = shot[top - 60 : top + 60, left - 1 : left + 2].mean(axis=(0, 1))
        assert np.abs(strip - slide_color(*expected, 0.1)).max() < 14


@pytest.mark.parametrize("what", ["the values at the pointer", pytest.param("a download", marks=pytest.mark.full)])
def test_the_page_states_that_its_result_was_replaced(browser: Browser, own_site: Site, what: str) -> None:
    with failing_page(browser) as page:
        show(page, own_site)
        page.keyboard.press("n")
        until(page, "wsiView.selection.last")
        os.utime(own_site.results[0].folder / "run.json")
        if what == "a download":
            page.get_by_role("link", name="Save the selection as GeoJSON").click()
        else:
            page.mouse.move(*place_on_screen(page, *PURPLE_AT))
        until(page, "document.querySelector('#notes p')")
        page.mouse.move(*place_on_screen(page, *PINK_AT))
        page.wait_for_timeout(300)
        expected = "The result has changed; stop wsi-view, start it again, then reload the page."
        assert page.locator("#notes p").all_inner_texts() == [expected]
        page.goto("about:blank")


def test_class_map_covers_the_slide_with_the_classes_colors(shared_page: Page, site: Site, tmp_path: Path) -> None:
    bare, both = "#x=640&y=416&zoom=0.7&outlines=0&map=0", "#x=640&y=416&zoom=0.7&outlines=0&map=0.5"
    show(shared_page, site, bare)
    before = {place: color_at(shared_page, *place) for place in (GLASS_AT, PINK_AT, PURPLE_AT)}
    show(shared_page, site, both)
    screenshot(shared_page, "viewer-class-map", tmp_path)
    assert np.abs(color_at(shared_page, *GLASS_AT) - before[GLASS_AT]).max() < 2
    for place, color in ((PINK_AT, COLORS[0]), (PURPLE_AT, COLORS[1])):
        assert np.abs(color_at(shared_page, *place) - mixed(before[place], color, 0.5)).max() < 4
    # An opaque map shows its own position: check both sides of the borders, three map pixels away.
    show(shared_page, site, both.replace("map=0.5", "map=1"))
    pink, purple = COLORS
    for x, y, color in ((404, 400, pink), (428, 400, purple), (724, 400, purple), (748, 400, pink), (1108, 600, pink)):
        assert np.abs(color_at(shared_page, x, y) - color).max() < 4
    assert np.abs(color_at(shared_page, 640, 500) - purple).max() < 4
    assert np.abs(color_at(shared_page, 640, 524) - pink).max() < 4
    assert np.abs(color_at(shared_page, 1132, 600) - slide_color(1132, 600, 0.7)).max() < 8


@pytest.mark.full
def test_class_toggle_and_opacity_change_the_pixels(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=640&y=416&zoom=0.7&outlines=0&map=1")
    assert np.abs(color_at(shared_page, *PURPLE_AT) - COLORS[1]).max() < 4
    shared_page.get_by_role("checkbox", name="class-1").uncheck()
    settle(shared_page)
    bare = color_at(shared_page, *PURPLE_AT)
    assert np.abs(bare - slide_color(*PURPLE_AT, 0.7)).max() < 8
    assert np.abs(color_at(shared_page, *PINK_AT) - COLORS[0]).max() < 4
    assert "off=1" in shared_page.url
    shared_page.get_by_role("checkbox", name="class-1").check()
    shared_page.get_by_label("Opacity of the class map").fill("0.25")
    settle(shared_page)
    assert np.abs(color_at(shared_page, *PURPLE_AT) - mixed(bare, COLORS[1], 0.25)).max() < 4


@pytest.mark.full
def test_probabilities_have_their_own_opacity_for_each_class(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=640&y=416&zoom=0.7&outlines=0&map=0")
    bare = color_at(shared_page, *PURPLE_AT)
    sliders = shared_page.locator(".class-opacity")
    assert [slider.is_visible() for slider in sliders.all()] == [False, False]
    shared_page.get_by_role("checkbox", name=re.compile("Probabilities")).check()
    shared_page.get_by_label("Opacity of the probability of class-0").fill("0")
    shared_page.get_by_label("Opacity of the probability of class-1").fill("0.5")
    settle(shared_page)
    # The network's probabilities are close to 0 or 1.
    assert np.abs(color_at(shared_page, *PURPLE_AT) - mixed(bare, COLORS[1], 0.5)).max() < 5
    assert np.abs(color_at(shared_page, *PINK_AT) - slide_color(*PINK_AT, 0.7)).max() < 8


def tip_at(page: Page, x: int, y: int) -> str | None:
    page.mouse.move(*place_on_screen(page, x, y))
    page.wait_for_timeout(300)
    tip = page.locator("#tip")
    return tip.inner_text() if tip.is_visible() else None


@pytest.mark.full
def test_hovering_shows_the_class_and_highlights_the_polygon(shared_page: Page, site: Site, tmp_path: Path) -> None:
    show(shared_page, site, "#x=640&y=416&zoom=0.7&map=0&outlines=1")
    areas = {c.name: c.area_mm2 for c in site.results[0].classes}
    before = color_at(shared_page, *PURPLE_AT)
    assert tip_at(shared_page, *GLASS_AT) is None
    for place, name in ((PINK_AT, "class-0"), (PURPLE_AT, "class-1")):
        tip = tip_at(shared_page, *place)
        assert tip is not None
        found = re.fullmatch(r"(\S+) · ([\d.]+) mm²", tip.strip())
        assert found is not None, tip
        assert found[1] == name
        assert float(found[2]) == pytest.approx(areas[name], rel=0.02)
    screenshot(shared_page, "viewer-hover", tmp_path)
    shared_page.mouse.move(*place_on_screen(shared_page, PURPLE_AT[0] + 60, PURPLE_AT[1]))
    shared_page.wait_for_timeout(300)
    assert np.abs(color_at(shared_page, *PURPLE_AT) - mixed(before, COLORS[1], 0x40 / 255)).max() < 4
    assert shared_page.locator("#place").inner_text().startswith("x 660, y 400 px  (660, 400 µm)  7×")


def test_outlines_are_drawn_on_the_borders_in_the_classes_colors(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=420&y=400&zoom=2&map=0&outlines=0")
    without = np.asarray(Image.open(io.BytesIO(capture(shared_page))).convert("RGB")).astype(int)
    show(shared_page, site, "#x=420&y=400&zoom=2&map=0&outlines=1")
    with_ = np.asarray(Image.open(io.BytesIO(capture(shared_page))).convert("RGB")).astype(int)
    left, top = (round(v) for v in place_on_screen(shared_page, 416, 400))
    changed = np.flatnonzero(
        np.abs(with_[top, left - 60 : left + 60] - without[top, left - 60 : left + 60]).max(axis=1) > 12
    )
    # The left border of the purple region is at x = 416 ± 1 map pixel (8 screen pixels). The line is 4 px wide.
    assert 3 <= changed.size <= 6
    assert abs(float(changed.mean()) - 60) <= 10
    line = with_[top, left - 60 + changed]
    assert np.abs(line - COLORS[1]).max(axis=1).min() < 12


@pytest.mark.full
def test_outlines_run_below_the_navigator(shared_page: Page, site: Site) -> None:
    pictures = []
    for opacity in (0, 1):
        show(shared_page, site, f"#x=900&y=400&zoom=2&map=0&outlines={opacity}")
        left, top = place_on_screen(shared_page, 1120, 220)  # on the pink region's right border
        box = shared_page.locator(".navigator").bounding_box()
        assert box is not None
        assert box["x"] < left < box["x"] + box["width"]
        assert box["y"] < top < box["y"] + box["height"]
        shot = np.asarray(Image.open(io.BytesIO(capture(shared_page))).convert("RGB")).astype(int)
        pictures.append(shot[round(top) - 4 : round(top) + 4, round(left) - 9 : round(left) + 9])
    assert np.abs(pictures[0] - pictures[1]).max() < 12


@pytest.mark.parametrize("zoom", [0.3, full(0.7), full(1.7), 6.0])
def test_the_scale_bar_has_the_stated_length(shared_page: Page, site: Site, zoom: float) -> None:
    show(shared_page, site, f"#x=640&y=416&zoom={zoom}")
    shown = shared_page.evaluate("() => wsiView.view().zoom")
    assert shown == pytest.approx(zoom, rel=0.01)
    text = shared_page.locator("#scale-text").inner_text()
    number, unit = text.split(" ")
    length_um = float(number) * {"nm": 1e-3, "µm": 1, "mm": 1e3}[unit]
    box = shared_page.locator("#scale-line").bounding_box()
    assert box is not None
    assert box["width"] == pytest.approx(length_um / site.results[0].run.slide.mpp * zoom, abs=1.0)
    assert 60 <= box["width"] <= 150.5
    assert float(number) in {1, 2, 5, 10, 20, 50, 100, 200, 500}
    # Compare with the slide: the borders of the pink region are 960 µm apart.
    left, right = place_on_screen(shared_page, 160, 400)[0], place_on_screen(shared_page, 1120, 400)[0]
    assert (right - left) / box["width"] * length_um == pytest.approx(960, rel=0.02)


@pytest.mark.full
def test_the_readout_has_no_negative_zero(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=-0.3&y=10&zoom=2")
    assert shared_page.locator("#place").inner_text().startswith("center: x 0, y 10 px")


@pytest.mark.full
def test_layers_have_one_order_whichever_is_turned_on_first(shared_page: Page, site: Site) -> None:
    show(shared_page, site, "#x=640&y=416&zoom=0.7&map=0&outlines=0&off=0")
    order = """() => [...Array(wsiView.osd.world.getItemCount()).keys()].map((i) =>
      wsiView.osd.world.getItemAt(i).source.getTileUrl(0, 0, 0).split("/").slice(1, 3).join(" "))"""
    for key in ("p", "1", "m"):
        shared_page.keyboard.press(key)
        settle(shared_page)
    assert [one.split()[0] for one in shared_page.evaluate(order)] == ["slide", "labels", "class", "class"]
    assert shared_page.evaluate(order)[2:] == ["class 0", "class 1"]
    for on in ("labels 2", "labels 3"):
        shared_page.keyboard.press("1")
        settle(shared_page)
        assert shared_page.evaluate(order)[1:] == [on, "class 0", "class 1"]


@pytest.mark.full
def test_keys_work_with_caps_lock_and_on_keyboards_that_need_alt_gr(shared_page: Page, site: Site) -> None:
    show(shared_page, site)

    def press(**event: Any) -> Any:
        script = "(e) => document.body.dispatchEvent(new KeyboardEvent('keydown', { bubbles: true, ...e }))"
        shared_page.evaluate(script, event)
        return shared_page.evaluate("() => JSON.parse(JSON.stringify(wsiView.controls.state.map))")

    assert press(key="M")["on"] is False  # Caps Lock
    assert press(key="M", shiftKey=True)["on"] is False
    assert press(key="]", ctrlKey=True, altKey=True, modifierAltGraph=True)["opacity"] == pytest.approx(0.55)
    assert press(key="]", ctrlKey=True)["opacity"] == pytest.approx(0.55)
    press(key="t", shiftKey=True)  # with Caps Lock, Shift makes a small letter
    assert shared_page.evaluate("() => wsiView.osd.viewport.getRotation()") == 270


@pytest.mark.full
def test_keys_do_what_the_help_states(shared_page: Page, site: Site) -> None:
    page = shared_page
    show(page, site)
    state = "() => JSON.parse(JSON.stringify({...wsiView.controls.state, ...wsiView.view()}))"
    announcement = page.locator("#announcement")

    def press(*keys: str) -> Any:
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_timeout(700)
        return page.evaluate(state)

    start = page.evaluate(state)
    assert press("m")["map"]["on"] is False
    assert announcement.inner_text() == "Class map off"
    assert press("o")["outlines"]["on"] is False
    assert press("m", "o", "p")["probability"]["on"] is True
    for on in (False, True):
        now = press("h")
        assert [now[layer]["on"] for layer in ("map", "outlines", "probability")] == [on] * 3
        assert announcement.inner_text() == ("Class map, Outlines, Probabilities on" if on else "All layers off")
    assert [c["on"] for c in press("2")["classes"]] == [True, False]
    assert announcement.inner_text() == "class-1 off"
    assert press("]")["map"]["opacity"] == pytest.approx(0.55)
    assert announcement.inner_text() == "Opacity of the class map 55 %"
    assert press("[", "[")["map"]["opacity"] == pytest.approx(0.35)
    assert press("+")["zoom"] == pytest.approx(start["zoom"] * 1.5, rel=0.02)
    assert press("ArrowLeft")["x"] < start["x"] - 50
    assert press("ArrowDown")["y"] > start["y"] + 50
    assert press("f")["zoom"] == pytest.approx(1, rel=0.02)
    assert press("0")["zoom"] == pytest.approx(start["zoom"], rel=0.02)
    press("2", "i")
    assert re.fullmatch(r"class-1, 0\.08\d mm², at x 640, y 416 px .*", page.locator("#announcement").inner_text())
    press("l")
    assert page.evaluate("() => navigator.clipboard.readText()") == page.url
    press("?")
    assert page.get_by_role("dialog", name="Keys and mouse").is_visible()
    listed = set(page.locator("#help kbd").all_inner_texts())
    assert {*"mophfil[]019?+−dagnNstTvqwerz", "Esc", "Enter", "Space", "Del"} <= listed
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


@pytest.mark.full
def test_the_page_reports_missing_tiles_once(browser: Browser, site: Site) -> None:
    with failing_page(browser) as page:
        page.route("**/slide/**", lambda route: route.fulfill(status=503))
        page.goto(site.page)
        until(page, """document.getElementById("notes").textContent.startsWith("Parts of the slide")""")
        page.wait_for_timeout(300)
        assert page.locator("#notes p").count() == 1
