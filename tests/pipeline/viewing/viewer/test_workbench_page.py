"""The tools of the page in a real browser: values, selection, magnification, turning, comparison, legend, outlines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer.results import find_results
from tests.browser import audited_page, axe_findings, capture, screenshot, until, watched_page
from tests.pipeline.fakes import COLORS, labels_of, probs_of
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.screen import (
    PINK_AT,
    PURPLE_AT,
    color_at,
    mixed,
    picture,
    place_on_screen,
    said,
    settle,
    show,
)

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full


def test_the_values_under_the_pointer_are_those_that_the_map_stores(page: Page, site: Site) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7")
    folder = site.results[0].folder
    labels_HW, probs_KHW = labels_of(folder), probs_of(folder)
    for place in (PINK_AT, PURPLE_AT, (414, 380), (100, 50), (1000, 700)):
        page.mouse.move(*place_on_screen(page, *place))
        until(page, f"String(wsiView.pointer.place().map(Math.round)) === '{place[0]},{place[1]}'")
        until(page, "document.getElementById('values').getAttribute('aria-busy') === 'false'")
        exact = page.evaluate("() => wsiView.pointer.place()")
        assert page.locator("#place").inner_text().startswith(f"x {exact[0]:,.0f}, y {exact[1]:,.0f} px")
        x, y = (int(value // 4) for value in exact)  # a map pixel is 4 pixels of the slide
        label, probs_K = int(labels_HW[y, x]), probs_KHW[:, y, x].tolist()
        text = page.locator("#values").inner_text()
        assert text.startswith(f"class-{label - 1} {100 * probs_K[label - 1] / 255:.1f} %" if label else "no class")
        for k, shown in re.findall(r"class-(\d) ([\d.]+) %", text):
            assert round(float(shown) * 255 / 100) == probs_K[int(k)]
    page.mouse.move(0, 0)


def test_values_are_shown_again_after_an_answer_that_ended_early(page: Page, site: Site) -> None:
    page.route("**/values/*", lambda route: route.fulfill(content_type="application/json", body='{"label": 1, "prob'))
    show(page, site, "#x=640&y=416&zoom=0.7")
    page.mouse.move(*place_on_screen(page, *PINK_AT))
    until(page, f"String(wsiView.pointer.place().map(Math.round)) === '{PINK_AT[0]},{PINK_AT[1]}'")
    until(page, "document.getElementById('values').getAttribute('aria-busy') === 'false'")
    assert page.locator("#values").inner_text() == ""
    page.unroute("**/values/*")
    page.mouse.move(*place_on_screen(page, *PURPLE_AT))
    until(page, "document.getElementById('values').textContent.startsWith('class-1')")


def test_several_regions_are_selected_and_saved_as_geojson(page: Page, site: Site, tmp_path: Path) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7")
    assert page.locator("#export-regions").is_hidden()
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1")
    page.keyboard.down("Shift")
    page.mouse.click(*place_on_screen(page, *PINK_AT))
    page.keyboard.up("Shift")
    said(page, "Added to the selection: class-0")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the selection as GeoJSON").click()
    assert re.fullmatch(r"block .1.\.regions\.geojson", download.value.suggested_filename)
    folder = site.results[0].folder
    stored = json.loads((folder / f"{folder.name}.geojson").read_text(encoding="utf-8"))
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    names = [feature["properties"]["classification"]["name"] for feature in saved["features"]]
    assert sorted(names) == ["class-0", "class-1"]
    assert all(feature in stored["features"] for feature in saved["features"])
    page.keyboard.press("Escape")
    assert page.locator("#export-regions").is_hidden()


def test_keys_set_the_magnification_and_a_coarse_slide_says_why_it_cannot(
    page: Page, site: Site, own_site: Site
) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7")
    for key, times in (("q", 5), ("w", 10), ("e", 20), ("r", 40)):
        page.keyboard.press(key)
        # 10× is 1 µm per pixel. Not `settle`: at once after the key, the view does not move yet.
        until(page, f"Math.abs(wsiView.view().zoom / {times / 10} - 1) < 0.01 && !wsiView.osd.isAnimating()")
        settle(page)
        assert page.locator("#place").inner_text().endswith(f"{times}×")
    result = own_site.results[0]
    run = read_run(result.folder)
    assert run is not None
    write_run(result.folder, run.model_copy(update={"slide": run.slide.model_copy(update={"mpp": 3.0})}))
    with serving(find_results(result.folder)) as coarse:
        show(page, coarse)
        assert page.get_by_role("button", name="40×").is_disabled()
        page.keyboard.press("r")
        said(page, "This slide is too coarse for 40×")
        assert page.get_by_role("button", name="20×").is_enabled()
        page.goto("about:blank")


def test_on_a_dense_screen_a_magnification_counts_pixels_of_the_screen(browser: Browser, site: Site) -> None:
    with watched_page(browser, device_scale_factor=2) as page:
        show(page, site, "#x=640&y=416&zoom=0.7")
        for key, times in (("w", 10), ("r", 40), ("f", 10)):
            page.keyboard.press(key)
            # The slide has 1 µm per pixel.
            until(page, f"Math.abs(wsiView.view().zoom / {times / 20} - 1) < 0.01 && !wsiView.osd.isAnimating()")
            settle(page)
            assert page.locator("#place").inner_text().endswith(f" {times}×")


def test_a_turned_slide_keeps_its_layers_outlines_and_places_together(page: Page, site: Site, tmp_path: Path) -> None:
    show(page, site, "#x=600&y=400&zoom=0.7&map=1&outlines=0")
    page.keyboard.press("t")
    until(page, "wsiView.view().degrees === 90 && !wsiView.osd.isAnimating()")
    settle(page)
    for place, color in ((PINK_AT, COLORS[0]), (PURPLE_AT, COLORS[1])):
        assert np.abs(color_at(page, *place) - color).max() < 4
    assert place_on_screen(page, 700, 400)[1] > place_on_screen(page, 600, 400)[1] + 60, "right is down"
    assert "turn=90" in page.url
    show(page, site, "#x=420&y=400&zoom=2&map=0&outlines=0&turn=30")
    edge = place_on_screen(page, 416, 400)
    without = picture(capture(page))
    show(page, site, "#x=420&y=400&zoom=2&map=0&outlines=1&turn=30")
    changed = np.abs(picture(capture(page)) - without).max(axis=2) > 12
    left, top = (round(v) for v in edge)
    assert changed[top - 10 : top + 11, left - 10 : left + 11].any(), "the outline lies on the turned border"
    assert not changed[top - 100 : top - 60, left - 10 : left + 11].all()
    page.mouse.move(*place_on_screen(page, *PURPLE_AT))
    until(page, "document.getElementById('tip').textContent.includes('class-1')")
    screenshot(page, "viewer-turned", tmp_path, whole=False)
    x = page.evaluate("() => wsiView.view().x")
    page.mouse.move(0, 0)
    page.keyboard.press("Shift+T")
    until(page, "Math.round(wsiView.view().degrees) === 300 && !wsiView.osd.isAnimating()")
    assert page.evaluate("() => wsiView.view().x") == pytest.approx(x, abs=1)


def test_the_slide_without_layers_moves_together_with_the_first_view(page: Page, site: Site, tmp_path: Path) -> None:
    show(page, site, "#x=600&y=400&zoom=0.7&map=1&outlines=0")
    page.keyboard.press("s")
    until(page, "wsiView.compare.bare?.osd.isOpen()")
    both = "() => [wsiView.view(), wsiView.compare.bare.view()]"

    def together() -> dict[str, float]:
        settle(page)
        page.wait_for_timeout(600)
        first, second = page.evaluate(both)
        for name in ("x", "y", "zoom", "width", "height", "degrees"):
            assert first[name] == pytest.approx(second[name], abs=2, rel=0.01), name
        view: dict[str, float] = first
        return view

    start = together()
    box = page.locator("#bare").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    shot = picture(capture(page))
    bare = shot[round(middle[1]) - 4 : round(middle[1]) + 5, round(middle[0]) - 4 : round(middle[0]) + 5].mean((0, 1))
    assert np.abs(color_at(page, start["x"], start["y"]) - COLORS[1]).max() < 4
    assert np.abs(bare - COLORS[1]).max() > 8, "the slide's own texture"
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 100, middle[1], steps=5)
    page.mouse.up()
    assert together()["x"] > start["x"] + 100
    page.mouse.wheel(0, -200)
    assert together()["zoom"] > start["zoom"] * 1.1
    page.keyboard.press("t")
    assert together()["degrees"] == 90
    page.keyboard.press("0")
    together()
    screenshot(page, "viewer-compare", tmp_path, whole=False)
    page.keyboard.press("s")
    assert page.locator("#bare").is_hidden()
    page.keyboard.press("e")
    page.keyboard.press("s")
    assert together()["zoom"] == pytest.approx(2, rel=0.01)


def test_the_legend_has_the_color_of_the_fill_over_tissue(page: Page, site: Site) -> None:
    tissue = np.array((202, 119, 176))
    show(page, site)
    opacity = page.evaluate("() => wsiView.controls.state.map.opacity")
    script = """() => [...document.querySelectorAll("#classes .swatch")].map((one) => {
      const canvas = document.createElement("canvas"); const context = canvas.getContext("2d");
      context.fillStyle = getComputedStyle(one).backgroundColor; context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data]; })"""
    for swatch, color in zip(page.evaluate(script), COLORS, strict=True):
        assert np.abs(np.array(swatch[:3]) - mixed(tissue, color, opacity)).max() <= 1
    page.keyboard.press("m")
    for swatch, color in zip(page.evaluate(script), COLORS, strict=True):
        assert swatch[:3] == list(color)


def test_outlines_are_single_and_thin_below_2x(page: Page, site: Site) -> None:
    widths = []
    for zoom in (0.3, 0.15):  # 3× and 1.5×
        pictures = []
        for outlines in (0, 1):
            show(page, site, f"#x=640&y=416&zoom={zoom}&map=0&outlines={outlines}")
            pictures.append(picture(capture(page)))
        left, top = (round(v) for v in place_on_screen(page, 416, 400))
        changed = np.abs(pictures[1] - pictures[0])[top, left - 12 : left + 12].max(axis=1) > 12
        widths.append(int(changed.sum()))
    assert widths[0] >= 3
    assert 1 <= widths[1] <= 2


def test_loading_outlines_are_announced_until_they_are_there(browser: Browser, site: Site) -> None:
    with browser.new_context(viewport={"width": 900, "height": 700}) as context:
        page = context.new_page()
        held: list[Any] = []

        def hold(route: Any) -> None:
            held.append(route)

        page.route("**/outlines/*", hold)
        page.goto(site.page)
        until(page, "!document.getElementById('loading').hidden")
        assert page.get_by_role("status").filter(has_text="Outlines are loading").is_visible()
        for route in held:
            route.continue_()
        until(page, "document.getElementById('loading').hidden && wsiView.outlines.front")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_tools_are_accessible_in_both_schemes_and_on_a_phone(
    browser: Browser, site: Site, tmp_path: Path, scheme: str, width: int
) -> None:
    with audited_page(browser, scheme, width=width, height=800) as page:
        show(page, site)
        if width == 390:
            page.locator("summary").click()
        for key in ("a", "Space", "g", "s", "n", "c"):
            page.keyboard.press(key)
        until(page, "wsiView.selection.last && document.querySelector('#rows [aria-pressed=true]')")
        settle(page)
        assert axe_findings(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        screenshot(page, f"viewer-tools-{scheme}-{width}", tmp_path, whole=False)
        page.keyboard.press("?")
        assert axe_findings(page) == []
        screenshot(page, f"viewer-keys-{scheme}-{width}", tmp_path, whole=False)
