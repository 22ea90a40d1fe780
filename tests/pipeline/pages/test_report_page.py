"""The report: what it says, and what a reader can do with it in a browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.batch import SlideJob, segment_batch
from pipeline.errors import Cancelled, OutputError
from pipeline.pages.page import area_text, duration_text, share_text
from pipeline.pages.report_page import write_report
from pipeline.pages.slide_page import write_slide_page
from pipeline.pages.slide_picture import SlidePicture
from pipeline.report import SlideResult, write_run, write_summary
from pipeline.segment import Progress, no_progress, segment_slide
from tests.browser import axe_findings, screenshot
from tests.pipeline.fakes import SMALL, colour_predictor, region_slide, run_of
from tests.slides import painted, write_slide

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIZE = (600, 400)
BOXES = {"tumour": (60, 40, 200, 120), "stroma": (300, 80, 250, 280)}
"""x, y, width, height of what is dark on the slide of `write_result`, and of the classes over it."""
NASTY = "größe 組織 <b>&\"'"


def write_result(
    output: Path, name: str = "slide", *, names: tuple[str, str] = ("tumour", "stroma"), **facts: Any
) -> Path:
    """A result's folder as far as the report reads it, of a grey slide with two dark boxes, each of one class."""
    folder = output / name
    folder.mkdir(parents=True)
    classes = tuple(zip(names, (RED, BLUE), strict=True))
    areas = dict(zip(names, (0.25, 0.75), strict=True))
    run = {
        "identity": {"format": 1, "slide": "5" * 64, "model": "e" * 64, "parameters": {"mpp": None, "overlap": 0.25}},
        "status": "done",
        "slide": {
            "name": f"{name}.svs", "path": f"slides/{name}.svs", "size": [12000, 8000], "mpp": 0.5, "vendor": "aperio",
            "mpp_source": "slide", "backend": "openslide", "bounds": [0, 0, 12000, 8000], "qupath_offset": [0, 0],
        },
        "model": "colon", "tissue_mm2": 1.5, "fold_mm2": 0.0, "polygons": 1234, "warnings": [], "bad_tiles_l0": [],
        "classes": [{"name": one, "color": list(colour)} for one, colour in classes],
        "class_areas_mm2": areas,
        "tiles": {"run": 400, "segmented": 100, "without class": 8, "unreadable": 0},
        "plan": {"map_mpp": 4.0, "mpp_m": 1.0, "level": 1},
        "versions": {"torch": "2"}, "outputs": [f"{name}.geojson", "index.html", "run.json", "thumbnail.jpg"],
    } | facts  # fmt: skip
    rgb_HWC = np.full((*SIZE[::-1], 3), 200, np.uint8)
    labels_HW = np.zeros(SIZE[::-1], np.uint8)
    for number, (x, y, width, height) in enumerate(BOXES.values(), start=1):
        rgb_HWC[y : y + height, x : x + width] = 20
        labels_HW[y : y + height, x : x + width] = number
    write_run(folder, run)
    write_slide_page(folder, run, SlidePicture(rgb_HWC, labels_HW, classes, um_per_px=10.0))
    return folder


def result_of(folder: Path, **facts: Any) -> SlideResult:
    run = run_of(folder)
    told: dict[str, Any] = {"seconds": 75.0, "areas_mm2": run["class_areas_mm2"], "tissue_mm2": run["tissue_mm2"]}
    return SlideResult(slide=folder.name, status="done", **(told | facts))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of five slides: two done, one without tissue, one skipped, one failed."""
    output = tmp_path_factory.mktemp("results")
    empty: dict[str, Any] = {
        "class_areas_mm2": {"tumour": 0.0, "stroma": 0.0},
        "tissue_mm2": 0.0,
        "status": "no tissue",
    }
    warned = write_result(output, "b10", warnings=["it was <scanned> twice"], tissue_mm2=30.0)
    glass = write_result(output, "glass", **empty)
    skipped = write_result(output, "b9", class_areas_mm2={"tumour": 0.9, "stroma": 0.1})
    results = [
        result_of(write_result(output, NASTY)),
        result_of(warned, resumed_blocks=7),
        SlideResult("glass", "no tissue", 2.0, run_of(glass)["class_areas_mm2"], 0.0),
        SlideResult("b9", "skipped", 0.1, run_of(skipped)["class_areas_mm2"], 1.5),
        SlideResult("torn", "failed", 0.2, error="torn.svs: <no slide>; copy it again"),
    ]
    write_summary(output, results)
    return write_report(output)


def opened(page: Page, path: Path) -> Page:
    page.goto(path.as_uri())
    return page


def names(page: Page) -> list[str]:
    """The slides that the table shows, from its top."""
    return [text.splitlines()[0] for text in page.locator("tbody tr:visible th").all_inner_texts()]


def row(page: Page, name: str) -> str:
    text = page.locator("tbody tr").filter(has=page.locator("th", has_text=name)).inner_text()
    return " ".join(text.split())


def stage(page: Page) -> NDArray[np.int16]:
    """What is seen of the slide and its classes, as rgb_HWC."""
    return np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")).astype(np.int16)


def near(rgb_HWC: NDArray[np.int16], colour: tuple[int, int, int], within: int = 40) -> NDArray[np.bool_]:
    return np.asarray((np.abs(rgb_HWC - np.array(colour)) <= within).all(axis=2))


@pytest.mark.parametrize(
    ("mm2", "text"),
    [(None, "–"), (0.0, "0 mm²"), (0.0004, "< 0.001 mm²"), (0.4559, "0.456 mm²"), (4.559, "4.56 mm²"),
     (45.59, "45.6 mm²"), (455.9, "456 mm²"), (4559.0, "4559 mm²")],
)  # fmt: skip
def test_areas_are_written_with_three_digits(mm2: float | None, text: str) -> None:
    assert area_text(mm2) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.0, "0 %"), (0.0004, "< 0.1 %"), (0.7384, "73.8 %"), (1.0, "100.0 %")]
)
def test_shares_are_written_in_percent(share: float | None, text: str) -> None:
    assert share_text(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_are_written_for_people(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_each_slide_has_its_status_areas_and_shares(page: Page, report: Path) -> None:
    opened(page, report)
    assert row(page, "b10") == (
        "b10 model colon resumed from 7 finished blocks ✓ done 30.0 mm² 1 min 15 s tumour 0.250 mm² 25.0 % "
        "stroma 0.750 mm² 75.0 % Warning: it was <scanned> twice"
    )
    assert row(page, "b9") == "b9 model colon ↷ skipped 1.50 mm² 0 s tumour 0.900 mm² 90.0 % stroma 0.100 mm² 10.0 %"
    assert row(page, "glass") == "glass model colon ○ no tissue 0 mm² 2 s tumour 0 mm² stroma 0 mm²"
    assert row(page, "torn") == "torn ✕ failed – 0 s Error: torn.svs: <no slide>; copy it again"


def test_all_slides_are_added_up_without_the_failed_one(page: Page, report: Path) -> None:
    opened(page, report)
    total = " ".join(page.locator(".total").inner_text().split())
    assert total == (
        "✓ done 2 ○ no tissue 1 ↷ skipped 1 ✕ failed 1 tissue 33.0 mm² time 2 min 32 s "
        "tumour 1.40 mm² 46.7 % stroma 1.60 mm² 53.3 %"
    )
    widths = [box["width"] for s in page.locator(".total .bar span").all() if (box := s.bounding_box())]
    assert widths[0] / sum(widths) == pytest.approx(1.4 / 3.0, abs=0.01)


def test_names_are_shown_as_they_are_and_their_links_lead_to_the_slides_page(page: Page, report: Path) -> None:
    opened(page, report)
    page.get_by_role("link", name=NASTY).click()
    page.wait_for_selector("#stage")
    assert page.locator("h1").inner_text() == NASTY
    assert page.title() == f"{NASTY}: tissue segmentation"
    page.get_by_role("link", name="All slides").click()
    assert page.locator("tbody tr").count() == 5


def test_thumbnails_show_the_classes_over_the_slide(page: Page, report: Path) -> None:
    opened(page, report)
    assert page.locator("tbody img").count() == 4
    loaded = page.eval_on_selector_all("tbody img", "all => all.map(img => img.complete && img.naturalWidth)")
    assert loaded == [256] * 4
    thumbnail = Image.open(report.parent / "b10" / "thumbnail.jpg")
    assert thumbnail.size == (256, 171)
    red, green, blue = thumbnail.getpixel((64, 40))  # type: ignore[misc] # of an RGB picture
    assert red > 100 > green + 50
    assert red > 100 > blue + 50


def test_slides_are_sorted_by_the_head_of_a_column_and_what_is_unknown_stands_last(page: Page, report: Path) -> None:
    opened(page, report)
    assert names(page) == ["b9", "b10", "glass", NASTY, "torn"]
    head = page.get_by_role("columnheader", name="Tissue")
    head.get_by_role("button").click()
    assert names(page) == ["glass", "b9", NASTY, "b10", "torn"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert names(page) == ["b10", "b9", NASTY, "glass", "torn"]
    assert head.get_attribute("aria-sort") == "descending"
    assert page.get_by_role("columnheader", name="Slide").get_attribute("aria-sort") == "none"


def test_slides_are_sorted_by_the_share_of_a_class(page: Page, report: Path) -> None:
    opened(page, report)
    page.get_by_label("Sort by").select_option(label="share of tumour")
    page.get_by_role("button", name="Largest first").click()
    assert names(page) == ["b9", "b10", NASTY, "glass", "torn"]
    assert page.get_by_role("button", name="Largest first").get_attribute("aria-pressed") == "true"


def test_a_slide_whose_model_has_other_classes_stands_last_by_their_share(page: Page, tmp_path: Path) -> None:
    folders = [
        write_result(tmp_path, "a", names=("nerve", "fat")),
        write_result(tmp_path, "b"),
        write_result(tmp_path, "c"),
    ]
    write_summary(tmp_path, [result_of(folder) for folder in folders])
    opened(page, write_report(tmp_path))
    page.get_by_label("Sort by").select_option(label="share of stroma")
    assert names(page) == ["b", "c", "a"]
    total = " ".join(page.locator(".total .classes").inner_text().split())
    assert total == ("nerve 0.250 mm² 8.3 % fat 0.750 mm² 25.0 % tumour 0.500 mm² 16.7 % stroma 1.50 mm² 50.0 %")


def test_slides_are_found_by_text_status_and_warnings(page: Page, report: Path) -> None:
    opened(page, report)
    count = page.get_by_role("status")
    assert count.inner_text() == "5 slides"
    page.get_by_label("Find").fill("GRÖSSE")
    assert names(page) == []
    page.get_by_label("Find").fill("GRÖßE 組織")
    assert names(page) == [NASTY]
    assert count.inner_text() == "1 of 5 slides"
    page.get_by_label("Find").fill("")
    page.get_by_label("Status").select_option("failed")
    assert names(page) == ["torn"]
    page.get_by_label("Status").select_option("")
    page.get_by_label("only with warnings or errors (2)").check()
    assert names(page) == ["b10", "torn"]


def test_the_report_is_worked_by_keyboard_alone(page: Page, report: Path) -> None:
    opened(page, report)
    page.keyboard.press("Tab")
    page.keyboard.type("b")
    assert names(page) == ["b9", "b10", NASTY]
    for _ in range(6):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Status"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.get_by_role("columnheader", name="Status").get_attribute("aria-sort") == "ascending"


def test_a_slide_page_gives_areas_tiles_and_provenance(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    text = " ".join(page.locator("main").inner_text().split())
    assert "tumour 0.250 mm² 25.0 % stroma 0.750 mm² 75.0 %" in text
    assert "classified 400 100.0 % segmented 100 25.0 % without any class 8 2.0 % unreadable in part 0 0 %" in text
    assert "Pixel size given none Overlap of tiles 0.25 of a tile's side" in text
    assert "12,000 × 8,000 px" in text
    assert f"Digest of the slide {'5' * 64} Model colon Digest of the model {'e' * 64}" in text
    assert "30.0 mm² of tissue; 1,234 polygons" in text
    assert "Warning: it was <scanned> twice" in page.locator("header").inner_text()
    assert "not a medical device" in page.locator("footer").inner_text()
    assert page.get_by_role("link", name="b10.geojson").get_attribute("href") == "b10.geojson"
    widths = [box["width"] for s in page.locator(".chart .bar span").all() if (box := s.bounding_box())]
    assert widths[1] / widths[0] == pytest.approx(3.0, abs=0.05)


def test_unreadable_tiles_are_named(page: Page, tmp_path: Path) -> None:
    folder = write_result(tmp_path, bad_tiles_l0=[[1024, 2048, 448, 448]])
    opened(page, folder / "index.html").get_by_text("Where tiles could not be read").click()
    assert page.get_by_text("1024, 2048, 448, 448").is_visible()


def test_the_scale_bar_is_as_long_as_it_says(page: Page, report: Path) -> None:
    opened(page, report.parent / "b10" / "index.html")
    (bar, picture) = (page.locator(css).bounding_box() for css in (".scale div", "#slide"))
    assert bar is not None
    assert picture is not None
    assert page.locator(".scale").inner_text() == "1 mm"
    assert bar["width"] / picture["width"] == pytest.approx(1000 / (SIZE[0] * 10.0), rel=0.02)


def test_classes_lie_exactly_on_what_they_were_found_on(page: Page, report: Path) -> None:
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


@pytest.mark.parametrize(("keys", "percent"), [((), 45), (("ArrowLeft",), 40), (("End",), 100), (("Home",), 0)])
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
    expected = [(1 - percent / 100) * 20 + percent / 100 * full for full in BLUE]
    np.testing.assert_allclose(middle, expected, atol=4)


def test_a_slide_without_classes_has_a_page_too(page: Page, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "glass.svs", painted((1000, 700)), mpp=1.0)
    result = segment_slide(path, tmp_path / "out", colour_predictor(), SMALL)
    assert result.folder is not None
    opened(page, result.folder / "index.html")
    assert page.locator(".status").inner_text() == "○ no tissue"
    assert page.locator(".layers img").count() == 0
    assert page.locator(".toggle input[data-class]:enabled").count() == 0
    assert "classified 0 –" in " ".join(page.locator("main").inner_text().split())
    assert axe_findings(page) == []


def test_a_segmented_slides_classes_lie_on_its_picture(page: Page, tmp_path: Path) -> None:
    result = segment_slide(region_slide(tmp_path / "region.svs"), tmp_path / "out", colour_predictor(), SMALL)
    assert result.folder is not None
    run = run_of(result.folder)
    assert {"index.html", "thumbnail.jpg"} <= set(run["outputs"])
    opened(page, result.folder / "index.html")
    page.get_by_role("button", name="Hide all").click()
    without_HWC = stage(page)
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Outlines").uncheck()
    page.get_by_label("Opacity of the classes").fill("100")
    # The classes have the very colours of what they were found on: where they lie right, nothing is seen to change.
    assert (np.abs(stage(page) - without_HWC).max(axis=2) > 40).mean() < 0.01
    page.get_by_label("class-0").uncheck()
    page.get_by_label("class-1").uncheck()
    assert page.locator(".layers img:visible").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
@pytest.mark.parametrize("name", ["index.html", f"{NASTY}/index.html"])
def test_pages_are_accessible_and_fit_their_screen(
    browser: Browser, report: Path, tmp_path: Path, name: str, width: int, scheme: Any
) -> None:
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme) as context:
        page = opened(context.new_page(), report.parent / name)
        screenshot(page, f"report-{'slide' if '/' in name else 'index'}-{scheme}-{width}", tmp_path)
        assert axe_findings(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("name", ["index.html", "b10/index.html"])
def test_pages_are_printed_without_their_controls(page: Page, report: Path, name: str) -> None:
    opened(page, report.parent / name)
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("input:visible, button:visible:not(thead button), select:visible").count() == 0
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins
    head = page.locator("tbody th").first.bounding_box()
    assert head is not None
    assert head["width"] > 120
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_pages_ask_for_nothing_outside_the_results(report: Path) -> None:
    for path in (report, report.parent / "b10" / "index.html"):
        text = path.read_text(encoding="utf-8")
        links = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert links
        assert all(link.startswith("data:") or not re.match(r"[a-z]+:|//|/", link) for link in links)
        assert "default-src 'none'" in text
        assert "http:" not in text
        assert "https:" not in text


def test_classes_may_be_called_anything(page: Page, tmp_path: Path) -> None:
    folder = write_result(tmp_path, names=("<script>alert(1)</script>", "{{ größe }} '\""))
    write_summary(tmp_path, [result_of(folder)])
    for path in (write_report(tmp_path), folder / "index.html"):
        opened(page, path)
        text = page.locator("main").inner_text()
        assert "<script>alert(1)</script>" in text
        assert "{{ größe }} '\"" in text
    opened(page, tmp_path / "index.html").get_by_label("Sort by").select_option(label="area of {{ größe }} '\"")
    assert names(page) == ["slide"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text(
            json.dumps({"identity": {}, "outputs": [], "class_areas_mm2": {"tumour": "much"}})
        ),
    ],
    ids=["missing", "torn", "changed"],
)
def test_without_its_run_json_a_slide_has_the_numbers_of_the_summary(
    page: Page, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = write_result(tmp_path)
    write_summary(tmp_path, [result_of(folder, warnings=("seen", "twice"))])
    spoil(folder / "run.json")
    opened(page, write_report(tmp_path))
    assert row(page, "slide") == (
        "slide ✓ done 1.50 mm² 1 min 15 s tumour 0.250 mm² 25.0 % stroma 0.750 mm² 75.0 % Warning: seen Warning: twice "
        "Warning: slide/run.json is missing or cannot be read; the numbers are those of summary.csv"
    )


def test_a_failed_run_over_a_former_result_says_that_the_former_one_is_there(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path)
    write_summary(tmp_path, [SlideResult("slide", "failed", 1.0, error="slide.svs: out of memory")])
    opened(page, write_report(tmp_path))
    assert row(page, "slide") == (
        "slide model colon ✕ failed – 1 s Error: slide.svs: out of memory "
        "Warning: the result of an earlier run is still there"
    )
    assert page.get_by_role("link", name="slide").get_attribute("href") == "slide/index.html"


def test_a_result_that_the_summary_has_lost_is_in_the_report(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path)
    (tmp_path / "other").mkdir()
    opened(page, write_report(tmp_path))
    assert row(page, "slide").startswith("slide model colon ✓ done 1.50 mm² – tumour")
    assert names(page) == ["slide"]


def test_a_slide_whose_name_is_no_text_is_linked(page: Page, tmp_path: Path) -> None:
    name = b"caf\xe9 50%".decode("utf-8", "surrogateescape")
    folder = write_result(tmp_path, "plain")
    folder = folder.rename(tmp_path / name)
    write_summary(tmp_path, [result_of(folder)])
    opened(page, write_report(tmp_path))
    page.get_by_role("link", name="caf\\udce9 50%").click()
    page.wait_for_selector("#stage")


def test_a_foreign_summary_is_named_and_the_former_report_is_left(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("my,own\n1,2\n")
    (tmp_path / "index.html").write_text("former")
    with pytest.raises(OutputError, match=r"summary\.csv: is no summary"):
        write_report(tmp_path)
    assert (tmp_path / "index.html").read_text() == "former"


def test_a_slides_folder_in_the_reports_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OutputError, match=r"index\.html: the report cannot be written: .*results themselves"):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_same_results_give_the_same_bytes_and_many_writers_leave_one_whole_page(tmp_path: Path) -> None:
    write_summary(tmp_path, [result_of(write_result(tmp_path, f"slide {i}")) for i in range(5)])
    expected = write_report(tmp_path).read_bytes()
    with ThreadPoolExecutor(8) as pool:
        written = {path.read_bytes() for path in pool.map(lambda _: write_report(tmp_path), range(24))}
    assert written == {expected}
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


class Pretended:
    """Workers whose results are there already; the slide "stop" is interrupted, others that are not there fail."""

    slides_at_once = 1

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        if job.path.stem == "stop":
            raise Cancelled("interrupted")
        return result_of(output / job.path.stem)

    def cancel(self) -> None:
        pass


def batch(output: Path, *stems: str) -> list[SlideResult]:
    jobs = [SlideJob(Path(f"{stem}.svs")) for stem in stems]
    return segment_batch(jobs, output, Pretended(), lambda _: no_progress, lambda _: None)


def test_a_batch_leaves_a_report_of_all_slides(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path, "one")
    batch(tmp_path, "one", "lost")
    opened(page, tmp_path / "index.html")
    assert names(page) == ["lost", "one"]
    assert row(page, "lost").startswith("lost ✕ failed – 0 s Error: lost.svs: FileNotFoundError")


def test_an_interrupted_batch_leaves_a_report_of_what_is_finished(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path, "one")
    with pytest.raises(Cancelled):
        batch(tmp_path, "one", "stop", "two")
    opened(page, tmp_path / "index.html")
    assert names(page) == ["one"]


def test_a_batch_interrupted_before_its_first_result_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        batch(tmp_path / "out", "stop")
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_logged_and_the_batch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_result(tmp_path, "one")
    (tmp_path / "index.html").mkdir()
    assert [result.status for result in batch(tmp_path, "one")] == ["done"]
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "index.html: the report cannot be written" in record.message
