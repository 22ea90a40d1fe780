"""Readers who space the text of the report, or enlarge it, can read all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.pages.report_page import write_report
from pipeline.results.names import PAGE
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from tests.pipeline.pages.results import opened, result_of, write_result
from tests.text_fit import READERS, Reader, misfits, page_of

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser


NAME = "TCGA-A6-2671-01Z-00-DX1.13a3c3f1-bb0d-4f1f"


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS)
def test_no_text_is_cut_off_or_overlaps(browser: Browser, tmp_path: Path, reader: Reader) -> None:
    large: dict[str, Any] = {"class_areas_mm2": {"tumour": 1234.5, "stroma": 2345.6}, "tissue_mm2": 3580.1}
    folder = write_result(tmp_path, NAME, warnings=["it was scanned twice"], **large)
    results = [
        result_of(folder, seconds=45_000.0, resumed_blocks=7),
        SlideResult("b", "unrecognized", 0.2, error="b.svs: no reader supports it"),
        SlideResult("torn", "failed", 0.2, error="torn.svs: cannot be read; copy it again"),
    ]
    write_summary(tmp_path, results)
    with page_of(browser, reader) as page:
        opened(page, write_report(tmp_path))
        assert misfits(page, reader) == []
        opened(page, folder / PAGE)
        assert misfits(page, reader) == []
