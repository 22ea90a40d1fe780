"""Tests of the page of all slides: its texts, sorting and search, and results with missing files."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from pipeline.errors import OutputError
from pipeline.pages.report_page import write_report
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from tests.pipeline.pages.results import NASTY, names, opened, result_of, row, write_result

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page


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


def test_names_are_shown_unchanged_and_link_to_the_slides_page(page: Page, report: Path) -> None:
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
    # The thumbnails are lazy (loading="lazy"), so they can load after the page.
    page.wait_for_function("[...document.querySelectorAll('tbody img')].every(img => img.complete)")
    loaded = page.eval_on_selector_all("tbody img", "all => all.map(img => img.complete && img.naturalWidth)")
    assert loaded == [256] * 4
    thumbnail = Image.open(report.parent / "b10" / "thumbnail.jpg")
    assert thumbnail.size == (256, 171)
    red, green, blue = thumbnail.getpixel((64, 40))  # type: ignore[misc] # of an RGB picture
    assert red > 100 > green + 50
    assert red > 100 > blue + 50


def test_a_column_header_sorts_the_slides_with_unknown_values_last(page: Page, report: Path) -> None:
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
    page.get_by_role("button", name="Reverse order").click()
    assert names(page) == ["b9", "b10", NASTY, "glass", "torn"]
    assert page.get_by_role("button", name="Reverse order").get_attribute("aria-pressed") == "true"


def test_a_slide_whose_model_lacks_the_class_comes_last_when_sorted_by_its_share(page: Page, tmp_path: Path) -> None:
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


def test_a_filtered_report_is_printed_with_the_number_of_its_slides(page: Page, report: Path) -> None:
    opened(page, report).emulate_media(media="print")
    count = page.get_by_role("status", include_hidden=True)
    assert not count.is_visible()
    page.emulate_media(media="screen")
    page.get_by_label("Find").fill("GRÖßE 組織")
    page.emulate_media(media="print")
    assert count.is_visible()
    assert count.inner_text() == "1 of 5 slides"
    page.emulate_media(media="screen")
    page.get_by_label("Find").fill("")
    page.emulate_media(media="print")
    assert not count.is_visible()


def test_the_report_can_be_used_with_the_keyboard_alone(page: Page, report: Path) -> None:
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
def test_without_run_json_a_slide_has_the_numbers_of_the_summary(
    page: Page, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = write_result(tmp_path)
    write_summary(tmp_path, [result_of(folder, warnings=("3 tiles are unreadable; they count as glass", "twice"))])
    spoil(folder / "run.json")
    opened(page, write_report(tmp_path))
    assert row(page, "slide") == (
        "slide ✓ done 1.50 mm² 1 min 15 s stroma 0.750 mm² 75.0 % tumour 0.250 mm² 25.0 % Warning: 3 tiles are "
        "unreadable; they count as glass; twice Warning: slide/run.json is missing or cannot be read; the numbers are "
        "those of summary.csv"
    )


def test_the_totals_have_the_colors_of_the_slides_that_know_them(page: Page, tmp_path: Path) -> None:
    folders = [write_result(tmp_path, name) for name in ("a", "b")]
    write_summary(tmp_path, [result_of(folder) for folder in folders])
    (folders[0] / "run.json").unlink()
    opened(page, write_report(tmp_path))
    swatches = page.locator(".total .swatch").evaluate_all("all => all.map(one => one.style.backgroundColor)")
    # The classes of a summary are in the order of its columns.
    assert swatches == ["rgb(0, 0, 255)", "rgb(255, 0, 0)"]


def test_a_failed_slide_with_an_earlier_result_links_to_that_result(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path)
    write_summary(tmp_path, [SlideResult("slide", "failed", 1.0, error="slide.svs: out of memory")])
    opened(page, write_report(tmp_path))
    assert row(page, "slide") == (
        "slide model colon ✕ failed – 1 s Error: slide.svs: out of memory "
        "Warning: the result of an earlier run is still there"
    )
    assert page.get_by_role("link", name="slide").get_attribute("href") == "slide/index.html"


def test_a_result_missing_from_the_summary_is_in_the_report(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path)
    (tmp_path / "other").mkdir()
    opened(page, write_report(tmp_path))
    assert row(page, "slide").startswith("slide model colon ✓ done 1.50 mm² – tumour")
    assert page.get_by_role("status").inner_text() == "1 slide"
    assert names(page) == ["slide"]


def test_a_result_with_a_damaged_record_that_the_summary_does_not_list_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_summary(tmp_path, [result_of(write_result(tmp_path, name)) for name in ("a",)])
    write_result(tmp_path, "b")
    for name in ("a", "b"):
        (tmp_path / name / "run.json").write_text("{")
    assert ">b<" not in write_report(tmp_path).read_text(encoding="utf-8")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'b'}: left out of the report: its run.json is damaged or was written by another program, and "
        "summary.csv does not list it"
    ]


def test_a_slide_whose_name_is_not_valid_utf8_is_linked(page: Page, tmp_path: Path) -> None:
    name = b"caf\xe9 50%".decode("utf-8", "surrogateescape")
    folder = write_result(tmp_path, "plain")
    folder = folder.rename(tmp_path / name)
    write_summary(tmp_path, [result_of(folder)])
    opened(page, write_report(tmp_path))
    page.get_by_role("link", name="caf\\udce9 50%").click()
    page.wait_for_selector("#stage")


def test_a_slide_whose_name_is_too_long_for_a_folder_is_in_the_report(tmp_path: Path) -> None:
    write_summary(tmp_path, [SlideResult("x" * 300, "failed", 0.0, error="x.svs: File name too long")])
    assert "x.svs: File name too long" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_slide_whose_name_was_edited_to_a_path_outside_the_folder_has_no_link(tmp_path: Path) -> None:
    outside = write_result(tmp_path / "elsewhere", "a")
    output = tmp_path / "results"
    output.mkdir()
    write_summary(output, [SlideResult(str(outside), "done", 1.0)])
    page = write_report(output).read_text(encoding="utf-8")
    assert f">{outside}<" in page
    assert "href" not in page.partition("<tbody")[2].partition("</tbody")[0]


def test_a_foreign_summary_is_refused_and_the_report_stays_unchanged(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("my,own\n1,2\n")
    (tmp_path / "index.html").write_text("former")
    with pytest.raises(OutputError, match=r"summary\.csv: was not written"):
        write_report(tmp_path)
    assert (tmp_path / "index.html").read_text() == "former"


def test_a_folder_with_the_name_of_the_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.html").mkdir()
    with pytest.raises(
        OutputError, match=r"index\.html: cannot be written: .*; the results do not depend on this page$"
    ):
        write_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_same_results_give_the_same_bytes_with_concurrent_writers(tmp_path: Path) -> None:
    write_summary(tmp_path, [result_of(write_result(tmp_path, f"slide {i}")) for i in range(5)])
    expected = write_report(tmp_path).read_bytes()
    with ThreadPoolExecutor(8) as pool:
        written = {path.read_bytes() for path in pool.map(lambda _: write_report(tmp_path), range(24))}
    assert written == {expected}
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
