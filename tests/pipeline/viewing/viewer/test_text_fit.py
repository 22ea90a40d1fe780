"""Readers who space the text of the pages, or enlarge it, can read all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.viewing.viewer.results import find_results
from tests.pipeline.viewing.viewer.conftest import copied, serving
from tests.pipeline.viewing.viewer.screen import said, settle, show
from tests.text_fit import Reader, misfits, page_of

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser

NAMES = ("TCGA-A6-2671-01Z-00-DX1.13a3c3f1-bb0d-4f1f", "b")


@pytest.mark.full
@pytest.mark.parametrize("reader", ["spacing", "twice"])
def test_no_text_is_cut_off_or_overlaps(browser: Browser, results_folder: Path, tmp_path: Path, reader: Reader) -> None:
    with (
        serving(find_results(copied(results_folder, tmp_path, *NAMES))) as site,
        page_of(browser, reader) as page,
    ):
        page.goto(site.url)
        assert misfits(page, reader) == []
        show(page, site)
        assert misfits(page, reader) == []
        if not page.locator("#panel-details").get_attribute("open"):
            page.locator("summary").click()
        for key in ("p", "x", "c", "g", "n"):
            page.keyboard.press(key)
        said(page, "Selected")
        page.keyboard.press("2")
        said(page, "Saved")
        for key in ("a", "Space"):
            page.keyboard.press(key)
        settle(page)
        assert misfits(page, reader) == []
        for key in ("a", "?"):
            page.keyboard.press(key)
        assert misfits(page, reader) == []
