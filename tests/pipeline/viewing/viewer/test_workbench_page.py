"""The viewer's tools in a real browser: measuring, values, table of regions, magnification, rotation, pictures."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.features import read_features
from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer.results import find_results
from tests.bench.viewer import with_polygons
from tests.browser import audited_page, axe_findings, screenshot, until, watched_page
from tests.pipeline.fakes import COLORS, labels_of, probs_of
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.screen import color_at, mixed, place_on_screen, settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full

PINK_AT, PURPLE_AT = (250, 600), (600, 400)
PHONE = {"width": 390, "height": 800}


def said(page: Page, text: str) -> None:
    until(page, f"document.getElementById('announcement').textContent.startsWith('{text}')")


def announced(page: Page) -> str:
    return page.locator("#announcement").inner_text()


def picture(data: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


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


@pytest.fixture
def many(site: Site, tmp_path: Path) -> Any:
    """Serve a copy of the result with 3,000 regions."""
    with serving(find_results(with_polygons(site.results[0].folder, tmp_path, 3000))) as running:
        yield running


def rows(page: Page) -> list[tuple[str, float, str]]:
    texts = [row.locator("th, td").all_inner_texts() for row in page.locator("#rows tr").all()]
    return [(name.strip(), float(area.split()[0]), probability) for name, area, probability in texts]


def test_the_table_sorts_thousands_of_regions_and_is_linked_with_the_view_both_ways(
    page: Page, many: Site, tmp_path: Path
) -> None:
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

    # From the view to the table: the page with the region's row is shown.
    head.get_by_role("button", name="Area").click()
    largest = max(range(len(features)), key=lambda n: features[n].area_mm2)
    other = next(n for n in range(len(features)) if features[n].area_mm2 < areas[1500])
    for one in (other, largest):
        page.evaluate("(number) => wsiView.selection.go(number)", one)
        until(page, f"document.querySelector('#rows [aria-pressed=true]')?.closest('tr').dataset.index === '{one}'")
    page.keyboard.press("1")
    until(page, "![...document.querySelectorAll('#rows th')].some((one) => one.textContent.includes('class-0'))")


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
    without = picture(page.screenshot())
    show(page, site, "#x=420&y=400&zoom=2&map=0&outlines=1&turn=30")
    changed = np.abs(picture(page.screenshot()) - without).max(axis=2) > 12
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
    shot = picture(page.screenshot())
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
    assert saved.shape == (view["height"], view["width"], 3)
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    for place, color in expected.items():
        left, top = place_on_screen(page, *place)
        x, y = round(left - stage["x"]), round(top - stage["y"])
        assert np.abs(saved[y - 4 : y + 5, x - 4 : x + 5].mean(axis=(0, 1)) - color).max() < 3
    # The bar of 200 µm at the lower left corner.
    bar = (saved[-22, :300] < 60).all(axis=1)
    assert bar.sum() == pytest.approx(140, abs=1)
    corner = saved[-60:, -120:].reshape(-1, 3)
    for swatch in COLORS:
        assert (np.abs(corner - swatch).max(axis=1) < 6).sum() > 50, "a swatch of the legend"


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
            pictures.append(picture(page.screenshot()))
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
