"""What the page measures in a real browser: lengths, areas, the table of regions and the saved picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely

from pipeline.formats.features import read_features
from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer.results import find_results
from tests.bench.viewer import with_polygons
from tests.browser import screenshot, until, watched_page
from tests.pipeline.fakes import COLORS
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.screen import (
    PINK_AT,
    PURPLE_AT,
    color_at,
    picture,
    place_on_screen,
    said,
    settle,
    show,
)

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full

PHONE = {"width": 390, "height": 800}


def announced(page: Page) -> str:
    return page.locator("#announcement").inner_text()


def test_a_distance_and_an_area_are_measured_with_the_mouse(page: Page, site: Site, tmp_path: Path) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7")
    page.keyboard.press("d")
    for place in ((200, 200), (500, 600)):
        page.mouse.click(*place_on_screen(page, *place))
    found = re.fullmatch(r"Distance ([\d.]+) µm", announced(page))
    assert found is not None
    assert float(found[1]) == pytest.approx(500, abs=3)  # one pixel of the slide is 1 µm
    page.keyboard.press("a")
    for place in ((600, 200), (900, 200), (900, 500), (600, 500), (600, 200)):
        page.mouse.click(*place_on_screen(page, *place))
    said(page, "Area 0.09")
    lines = page.locator("#measurements li").all_inner_texts()
    assert [line.split()[0] for line in lines] == ["Distance", "Area"]
    assert float(lines[1].split()[1]) == pytest.approx(0.09, rel=0.01)
    assert page.locator("#tip").is_hidden()
    screenshot(page, "viewer-measure", tmp_path, whole=False)
    page.keyboard.press("z")
    assert page.locator("#measurements li").count() == 1
    page.keyboard.press("Delete")
    assert page.locator("#measurements li").count() == 0
    page.keyboard.press("z")
    assert announced(page) == "Nothing to undo"
    page.keyboard.press("Escape")
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1")


def test_keys_alone_measure_at_the_crosshair(page: Page, site: Site) -> None:
    show(page, site, "#x=400&y=400&zoom=1")
    page.keyboard.press("d")
    said(page, "Measure distance")
    assert page.locator("#crosshair").is_visible()
    page.keyboard.press("Space")
    assert announced(page) == "Point 1"
    start = page.evaluate("() => wsiView.view().x")
    page.keyboard.press("ArrowRight")
    settle(page)
    moved = page.evaluate("() => wsiView.view().x") - start
    page.keyboard.press("Space")
    said(page, "Distance ")
    assert float(announced(page).split()[1]) == pytest.approx(moved, rel=0.01)
    page.keyboard.press("a")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    assert announced(page) == "This needs 3 points"
    page.keyboard.press("Escape")
    assert page.locator("#crosshair").is_hidden()


def test_a_point_is_put_once_at_one_place(page: Page, site: Site) -> None:
    show(page, site, "#x=400&y=400&zoom=1")
    page.keyboard.press("a")
    for key in ("", "ArrowRight", "ArrowDown"):
        if key:
            page.keyboard.press(key)
            settle(page)
        page.keyboard.press("Space")
        page.keyboard.press("Space")
    assert page.evaluate("() => wsiView.measures.points.length") == 3
    page.keyboard.press("Enter")
    assert announced(page).startswith("Area 0.0")
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
        settle(page)
        page.get_by_role("button", name="Point").click()
    page.keyboard.press("Enter")
    until(page, "wsiView.measures.done.length === 2")
    assert page.evaluate("() => wsiView.measures.done[1].points.length") == 3


def test_a_line_that_crosses_itself_has_no_area(page: Page, site: Site) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7")
    page.keyboard.press("a")
    for place in ((600, 200), (900, 500), (900, 200), (600, 500)):
        page.mouse.click(*place_on_screen(page, *place))
    page.keyboard.press("Enter")
    assert announced(page) == "Area not defined: the line crosses itself"


def test_lengths_areas_and_crossings_are_those_of_an_independent_library(page: Page, site: Site) -> None:
    show(page, site)
    rng = np.random.default_rng(3)
    shapes = [rng.uniform(0, 100, (count, 2)).tolist() for count in (3, 4, 5, 6, 9) for _ in range(20)]
    script = """async (shapes) => {
      const s = await import("/assets/shapes.js");
      return shapes.map((p) => [s.lineLength(p), s.enclosedArea(p), s.crossesItself(p)]); }"""
    simple = 0
    for points, (length, area, crosses) in zip(shapes, page.evaluate(script, shapes), strict=True):
        polygon = shapely.Polygon(points)
        assert length == pytest.approx(shapely.LineString(points).length)
        assert crosses is not polygon.is_valid
        if polygon.is_valid:
            simple += 1
            assert area == pytest.approx(polygon.area)
    assert 20 < simple < 90


def test_areas_of_every_size_are_readable(page: Page, site: Site) -> None:
    show(page, site)
    shown = {
        12.345: "12.35 mm²",
        0.012: "0.012 mm²",
        0.00012345: "0.00012 mm²",
        1e-6: "0.000001 mm²",
        2.5e-7: "0.25 µm²",
        1e-9: "0.001 µm²",
        0.0: "0 mm²",
    }
    script = """async (areas) => { const r = await import("/assets/readout.js"); return areas.map(r.area); }"""
    assert page.evaluate(script, list(shown)) == list(shown.values())


def test_a_tap_puts_points_and_shows_the_values_and_coordinates_on_a_phone(browser: Browser, site: Site) -> None:
    with watched_page(browser, **PHONE, has_touch=True) as page:
        show(page, site)
        assert page.locator("#place").inner_text().startswith("center: x ")
        page.touchscreen.tap(*place_on_screen(page, *PURPLE_AT))
        until(page, "document.getElementById('values').textContent.startsWith('class-1')")
        x, y = (int(v) for v in re.findall(r"[xy] (\d+)", page.locator("#place").inner_text()))
        assert [x, y] == pytest.approx(PURPLE_AT, abs=5)
        page.locator("summary").click()
        page.get_by_role("button", name="Distance").tap()
        for place in (PINK_AT, PURPLE_AT):
            page.touchscreen.tap(*place_on_screen(page, *place))
        said(page, "Distance ")
        expected = float(np.hypot(PURPLE_AT[0] - PINK_AT[0], PURPLE_AT[1] - PINK_AT[1]))
        assert float(announced(page).split()[1]) == pytest.approx(expected, rel=0.02)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.fixture
def many(site: Site, tmp_path: Path) -> Any:
    """Serve a copy of the result with 3,000 regions."""
    with serving(find_results(with_polygons(site.results[0].folder, tmp_path, 3000))) as running:
        yield running


def rows(page: Page) -> list[tuple[str, float, str]]:
    texts = [row.locator("th, td").all_inner_texts() for row in page.locator("#rows tr").all()]
    return [(name.strip(), float(area.split()[0]), probability) for name, area, probability in texts]


def test_the_table_sorts_thousands_of_regions_and_is_linked_with_the_view_both_ways(
    many: Site, page: Page, tmp_path: Path
) -> None:
    # `many` comes before `page`, so that the page closes before its server does.
    features = list(read_features(many.results[0].outlines, many.results[0].run.classes))
    areas = sorted((one.area_mm2 for one in features), reverse=True)
    show(page, many, "#x=640&y=416&zoom=1")
    page.keyboard.press("g")
    until(page, "document.querySelectorAll('#rows tr').length === 12")
    until(page, "!document.getElementById('rows').textContent.includes('…')")
    assert [area for _, area, _ in rows(page)] == pytest.approx(areas[:12], rel=0.02)
    assert page.locator("#rows-shown").inner_text() == f"1–12 of {len(features):,}"
    page.get_by_role("button", name="More regions").click()
    until(page, "document.getElementById('rows-shown').textContent.startsWith('13–')")
    assert [area for _, area, _ in rows(page)] == pytest.approx(areas[12:24], rel=0.02)
    head = page.locator("#region-table thead")
    head.get_by_role("button", name="Prob.").click()
    head.get_by_role("button", name="Prob.").click()
    until(page, "document.querySelector('[aria-sort=ascending]')?.textContent.startsWith('Prob')")
    shown = [float(probability.split()[0]) for _, _, probability in rows(page)]
    served = 100 - 100 * np.sort(np.frombuffer(many.get("uncertainty").body, "<f4"))[::-1][:12]
    assert shown == pytest.approx(served.tolist(), abs=0.06)
    head.get_by_role("button", name="Class").click()
    until(page, "document.querySelector('[aria-sort=descending]')?.textContent.startsWith('Class')")
    assert {name for name, _, _ in rows(page)} == {"class-0"}

    page.locator("#rows tr").nth(3).get_by_role("button").click()
    said(page, "Selected: class-0")
    settle(page)
    number = int(page.locator("#rows tr").nth(3).get_attribute("data-index") or -1)
    center, view = features[number].geometry_l0.envelope.centroid, page.evaluate("() => wsiView.view()")
    assert (view["x"], view["y"]) == (pytest.approx(center.x, abs=2), pytest.approx(center.y, abs=2))
    pressed = page.locator("#rows tr:has([aria-pressed=true])")
    assert pressed.get_attribute("data-index") == str(number)
    screenshot(page, "viewer-table", tmp_path, whole=False)

    # Other opacities change no row, so the page stays.
    page.get_by_role("button", name="More regions").click()
    until(page, "document.getElementById('rows-shown').textContent.startsWith('13–')")
    page.keyboard.press("]")
    page.wait_for_timeout(300)
    assert page.locator("#rows-shown").inner_text().startswith("13–")

    # From the view to the table: the page with the region's row is shown.
    head.get_by_role("button", name="Area").click()
    largest = max(range(len(features)), key=lambda n: features[n].area_mm2)
    other = next(n for n in range(len(features)) if features[n].area_mm2 < areas[1500])
    for one in (other, largest):
        page.evaluate("(number) => wsiView.selection.go(number)", one)
        until(page, f"document.querySelector('#rows [aria-pressed=true]')?.closest('tr').dataset.index === '{one}'")
    page.keyboard.press("1")
    until(page, "![...document.querySelectorAll('#rows th')].some((one) => one.textContent.includes('class-0'))")


def test_a_button_of_the_table_keeps_the_focus_on_the_first_page(many: Site, page: Page) -> None:
    show(page, many)
    page.keyboard.press("g")
    until(page, "document.querySelectorAll('#rows tr').length === 12")
    before = page.get_by_role("button", name="Previous regions")
    assert before.get_attribute("aria-disabled") == "true"
    page.get_by_role("button", name="More regions").click()
    until(page, "document.getElementById('rows-shown').textContent.startsWith('13–')")
    assert before.get_attribute("aria-disabled") == "false"
    before.focus()
    for _ in range(2):
        page.keyboard.press("Enter")
        until(page, "document.getElementById('rows-shown').textContent.startsWith('1–')")
        assert page.evaluate("() => document.activeElement.id") == "rows-before"


def test_a_page_of_the_table_is_shown_although_the_probabilities_arrive_at_that_moment(many: Site, page: Page) -> None:
    show(page, many)
    page.keyboard.press("g")
    until(page, "document.querySelectorAll('#rows tr').length === 12")
    page.evaluate("() => { document.getElementById('rows-after').click(); wsiView.outlines.measured(); }")
    until(page, "document.getElementById('rows-shown').textContent.startsWith('13–')")


def test_long_names_stay_inside_the_panel_the_tip_and_the_saved_picture(
    own_site: Site, page: Page, tmp_path: Path
) -> None:
    folder = own_site.results[0].folder
    run = read_run(folder)
    assert run is not None
    names = ("Invasive micropapillary carcinoma with lymphovascular invasion 1", "W" * 64)
    classes = tuple(dataclasses.replace(one, name=name) for one, name in zip(run.classes, names, strict=True))
    areas = dict(zip(names, run.class_areas_mm2.values(), strict=True))
    write_run(folder, run.model_copy(update={"classes": classes, "class_areas_mm2": areas}))
    with serving(find_results(folder)) as long:
        show(page, long)
        for key in ("c", "g"):
            page.keyboard.press(key)
        until(page, "document.querySelectorAll('#rows tr').length === 2")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            settle(page)
            sizes = page.evaluate("() => ((e) => [e.scrollWidth, e.clientWidth])(document.getElementById('panel'))")
            assert sizes[0] <= sizes[1]
            page.mouse.move(*place_on_screen(page, *PURPLE_AT))
            until(page, "document.getElementById('tip').textContent.includes('WWW')")
            tip, stage = page.locator("#tip").bounding_box(), page.locator("#stage").bounding_box()
            assert tip is not None
            assert stage is not None
            assert tip["x"] >= stage["x"]
            assert tip["x"] + tip["width"] <= stage["x"] + stage["width"]
        with page.expect_download() as download:
            page.keyboard.press("v")
        saved = picture(Path(download.value.path()).read_bytes())
        view = page.evaluate("() => wsiView.view()")
        assert saved.shape == (view["height"] + 2 * 22 + 12, view["width"], 3)
        screenshot(page, "viewer-long-names", tmp_path, whole=False)
        legend = saved[round(view["height"]) :]
        assert (legend[:, -9:] > 250).all(), "the names end before the edge"
        assert (legend[:, 200:-9] < 60).any()
        page.goto("about:blank")


def test_a_legend_of_many_entries_is_complete_in_the_saved_picture(page: Page, site: Site) -> None:
    page.set_viewport_size({"width": 1000, "height": 600})
    show(page, site)
    script = """async () => {
      const { pictureOf } = await import("/assets/picture.js");
      const names = [...Array(30).keys()].map((k) => `class number ${k + 1}`);
      const entries = names.map((name) => ({ name, color: "#f00", fill: "#f00" }));
      const texts = [];
      const { fillText } = CanvasRenderingContext2D.prototype;
      CanvasRenderingContext2D.prototype.fillText = (...text) => texts.push(text);
      const canvas = pictureOf(wsiView.stage, [], entries);
      CanvasRenderingContext2D.prototype.fillText = fillText;
      return [canvas.width, canvas.height, texts]; }"""
    width, height, texts = page.evaluate(script)
    view = page.evaluate("() => wsiView.view()")
    places = {text: (x, y) for text, x, y in texts if text.startswith("class number")}
    assert len(set(places.values())) == 30
    assert all(0 < x < width - 80 and view["height"] < y < height for x, y in places.values())


def test_the_picture_of_the_view_has_layers_scale_bar_and_legend(page: Page, site: Site, tmp_path: Path) -> None:
    show(page, site, "#x=640&y=416&zoom=0.7&map=1&outlines=1")
    expected = {place: color_at(page, *place) for place in (PINK_AT, PURPLE_AT)}
    with page.expect_download() as download:
        page.keyboard.press("v")
    assert re.fullmatch(r"block .1. x640 y416 7×\.png", download.value.suggested_filename)
    data = Path(download.value.path()).read_bytes()
    (tmp_path / "saved.png").write_bytes(data)
    saved = picture(data)
    view = page.evaluate("() => wsiView.view()")
    assert saved.shape == (view["height"] + 22 + 12, view["width"], 3)
    saved, legend = saved[: round(view["height"])], saved[round(view["height"]) :]
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    for place, color in expected.items():
        left, top = place_on_screen(page, *place)
        x, y = round(left - stage["x"]), round(top - stage["y"])
        assert np.abs(saved[y - 4 : y + 5, x - 4 : x + 5].mean(axis=(0, 1)) - color).max() < 3
    # The bar of 200 µm at the lower left corner.
    bar = (saved[-22, :300] < 60).all(axis=1)
    assert bar.sum() == pytest.approx(140, abs=1)
    for swatch in COLORS:
        assert (np.abs(legend.reshape(-1, 3) - swatch).max(axis=1) < 6).sum() > 50, "a swatch of the legend"
