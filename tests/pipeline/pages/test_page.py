"""Tests of formatted numbers, and of the accessibility, printing, links and names of every page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.pages.page import area_text, duration_text
from pipeline.pages.report_page import write_report
from pipeline.results.areas import share_text
from pipeline.results.summary import write_summary
from tests.browser import axe_findings, screenshot
from tests.cases import full
from tests.pipeline.pages.results import NASTY, names, opened, result_of, write_result

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page


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
def test_durations_are_written_in_two_units(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("scheme", ["light", full("dark")])
@pytest.mark.parametrize("width", [full(1280), 320])
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
def test_pages_print_without_their_controls(page: Page, report: Path, name: str) -> None:
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


def test_pages_load_nothing_from_outside_the_results(report: Path) -> None:
    for path in (report, report.parent / "b10" / "index.html"):
        text = path.read_text(encoding="utf-8")
        links = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert links
        assert all(link.startswith("data:") or not re.match(r"[a-z]+:|//|/", link) for link in links)
        assert "default-src 'none'" in text
        assert "http:" not in text
        assert "https:" not in text


def test_class_names_are_escaped(page: Page, tmp_path: Path) -> None:
    folder = write_result(tmp_path, names=("<script>alert(1)</script>", "{{ größe }} '\""))
    write_summary(tmp_path, [result_of(folder)])
    for path in (write_report(tmp_path), folder / "index.html"):
        opened(page, path)
        text = page.locator("main").inner_text()
        assert "<script>alert(1)</script>" in text
        assert "{{ größe }} '\"" in text
    opened(page, tmp_path / "index.html").get_by_label("Sort by").select_option(label="area of {{ größe }} '\"")
    assert names(page) == ["slide"]
