"""Tests of the page of a slide: its texts, and its classes over its picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.pages.report_page import write_report
from pipeline.slide.recipe import segment_slide
from tests.browser import axe_findings
from tests.cases import full
from tests.pipeline.fakes import SMALL, color_predictor, region_slide, run_of
from tests.pipeline.pages.results import BLUE, BOXES, PEN, RED, SIZE, near, opened, stage, write_result
from tests.slides import painted, write_slide
from wsi.left_out import LeftOut

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page


def test_a_slide_page_gives_areas_tiles_and_provenance(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    text = " ".join(page.locator("main").inner_text().split())
    assert "tumour 0.250 mm² 25.0 % stroma 0.750 mm² 75.0 %" in text
    assert "classified 400 100.0 % segmented 100 25.0 % without a class 8 2.0 % partly unreadable 0 0 %" in text
    assert (
        "Requested pixel size none Requested canvas size 896 model pixels "
        "Smallest region or gap, before borders are smoothed 2000 µm² Runtime of the networks openvino"
    ) in text
    assert "torch 2 openvino 3" in text
    assert "12,000 × 8,000 px" in text
    assert f"Digest of the slide {'5' * 64} Model colon Digest of the model {'e' * 64}" in text
    assert "30.0 mm² of tissue; 1,234 polygons" in text
    assert "Warning: it was <scanned> twice" in page.locator("header").inner_text()
    assert "not a medical device" in page.locator("footer").inner_text()
    assert page.get_by_role("link", name="b10.geojson").get_attribute("href") == "b10.geojson"
    widths = [box["width"] for s in page.locator(".chart .bar span").all() if (box := s.bounding_box())]
    assert widths[1] / widths[0] == pytest.approx(3.0, abs=0.05)


def test_left_out_areas_are_listed_and_shown_only_on_request(page: Page, tmp_path: Path) -> None:
    pen, fold = ({"name": name, "area_mm2": area, "pieces": 2} for name, area in (("pen", 0.5), ("fold", 0.25)))
    folder = write_result(tmp_path, tissue_mm2=1.5, left_out=[fold, pen])
    text = " ".join(opened(page, folder / "index.html").locator("main").inner_text().split())
    assert "1.50 mm² of tissue; 1,234 polygons" in text
    assert "Folds are part of the tissue" in text
    assert "fold 0.250 mm² 2 pen 0.500 mm² 2" in text
    page.get_by_label("Opacity of the classes").fill("100")
    hidden_HWC = stage(page)
    page.get_by_label("pen").check()
    shown_HWC = stage(page)
    scale = shown_HWC.shape[1] / SIZE[0]
    x, y, width, height = (round(scale * length) for length in PEN)
    pen_at = np.s_[y + 3 : y + height - 3, x + 3 : x + width - 3]
    assert near(shown_HWC[pen_at], LeftOut.PEN.color).all()
    assert not near(hidden_HWC[pen_at], LeftOut.PEN.color).any()
    page.get_by_role("button", name="Show all").click()
    assert not page.get_by_label("fold").is_checked()


def test_the_page_lists_unreadable_tiles(page: Page, tmp_path: Path) -> None:
    folder = write_result(tmp_path, bad_tiles_l0=[[1024, 2048, 448, 448]])
    opened(page, folder / "index.html").get_by_text("Where tiles could not be read").click()
    assert page.get_by_text("1024, 2048, 448, 448").is_visible()


def test_the_scale_bar_has_the_stated_length(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    (bar, picture) = (page.locator(css).bounding_box() for css in (".scale div", "#slide"))
    assert bar is not None
    assert picture is not None
    assert page.locator(".scale").inner_text() == "1 mm"
    assert bar["width"] / picture["width"] == pytest.approx(1000 / (SIZE[0] * 10.0), rel=0.02)


def test_classes_lie_exactly_on_their_regions_of_the_slide(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    page.get_by_role("button", name="Hide all").click()
    dark_HW = near(stage(page), (20, 20, 20))
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Outlines").uncheck()
    page.get_by_label("Opacity of the classes").fill("100")
    seen_HWC = stage(page)
    classified_HW = near(seen_HWC, RED) | near(seen_HWC, BLUE)
    share = sum(width * height for _, _, width, height in BOXES.values()) / (SIZE[0] * SIZE[1])
    assert dark_HW.mean() == pytest.approx(share, rel=0.02)
    ys, xs = np.nonzero(dark_HW)
    class_ys, class_xs = np.nonzero(classified_HW)
    for dark, found in ((xs, class_xs), (ys, class_ys)):
        assert abs(int(dark.min()) - int(found.min())) <= 1
        assert abs(int(dark.max()) - int(found.max())) <= 1
    assert (dark_HW ^ classified_HW).mean() < 0.01


def test_a_toggle_hides_its_class_and_no_other(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    before_HWC = stage(page)
    page.get_by_label("tumour").uncheck()
    after_HWC = stage(page)
    scale = before_HWC.shape[1] / SIZE[0]
    x, y, width, height = (round(scale * length) for length in BOXES["tumour"])
    tumour = np.s_[y + 3 : y + height - 3, x + 3 : x + width - 3]
    assert near(after_HWC[tumour], (20, 20, 20)).all()
    assert not near(before_HWC[tumour], (20, 20, 20)).any()
    rest_HW = np.ones(before_HWC.shape[:2], bool)
    rest_HW[y - 3 : y + height + 3, x - 3 : x + width + 3] = False
    np.testing.assert_array_equal(before_HWC[rest_HW], after_HWC[rest_HW])


@pytest.mark.parametrize(("keys", "percent"), [full((), 45), (("ArrowLeft",), 40), (("End",), 100), full(("Home",), 0)])
def test_the_slider_sets_the_opacity_of_the_classes(page: Page, report: Path, keys: tuple[str], percent: int) -> None:
    opened(page, report.parent / "b10" / "index.html")
    page.get_by_label("Opacity of the classes").focus()
    for key in keys:
        page.keyboard.press(key)
    assert page.locator("#percent").inner_text() == f"{percent} %"
    seen_HWC = stage(page)
    x, y, width, height = BOXES["stroma"]
    scale = seen_HWC.shape[1] / SIZE[0]
    middle = seen_HWC[round(scale * (y + height / 2)), round(scale * (x + width / 2))]
    expected = [(1 - percent / 100) * 20 + percent / 100 * blue for blue in BLUE]
    np.testing.assert_allclose(middle, expected, atol=4)


def test_a_slide_without_classes_has_a_page(page: Page, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "glass.svs", painted((1000, 700)), mpp=1.0)
    result = segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
    assert result.folder is not None
    opened(page, result.folder / "index.html")
    assert page.locator(".status").inner_text() == "○ no tissue"
    assert page.locator(".layers img").count() == 0
    assert page.locator(".toggle input[data-class]:enabled").count() == 0
    assert "classified 0 –" in " ".join(page.locator("main").inner_text().split())
    assert axe_findings(page) == []


def test_the_page_of_a_slide_in_a_folder_links_to_the_report(page: Page, tmp_path: Path) -> None:
    slide, output = region_slide(tmp_path / "region.svs"), tmp_path / "out"
    segment_slide(slide, output, color_predictor(), SMALL, name="study/case/region")
    report = write_report(output)
    opened(page, output / "study" / "case" / "region" / "index.html").get_by_role("link", name="All slides").click()
    page.wait_for_url(report.as_uri())


def test_a_segmented_slides_classes_lie_on_its_picture(page: Page, tmp_path: Path) -> None:
    result = segment_slide(region_slide(tmp_path / "region.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert result.folder is not None
    run = run_of(result.folder)
    assert {"index.html", "thumbnail.jpg"} <= set(run["outputs"])
    opened(page, result.folder / "index.html")
    page.get_by_role("button", name="Hide all").click()
    without_HWC = stage(page)
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Outlines").uncheck()
    page.get_by_label("Opacity of the classes").fill("100")
    # The classes have the colors of their regions, so correctly placed classes do not change the picture.
    assert (np.abs(stage(page) - without_HWC).max(axis=2) > 40).mean() < 0.01
    page.get_by_label("class-0").uncheck()
    page.get_by_label("class-1").uncheck()
    assert page.locator(".layers img:visible").count() == 0
