"""Readers who space the text of the page, or enlarge it, can read all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models.bundle import Bundle
from tests.browser import until
from tests.pipeline.labeling.desks import desk, label_slide
from tests.pipeline.labeling.pages import press, ready, serving
from tests.text_fit import READERS, Reader, misfits, page_of

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser

CLASSES = ("class-0", "tumor_associated_stroma", "lymphocytes")


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS)
def test_no_text_is_cut_off_or_overlaps(
    browser: Browser, tmp_path: Path, shipped: Bundle, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    slide = label_slide(tmp_path / "TCGA-A6-2671-01Z-00-DX1.13a3c3f1-bb0d-4f1f.svs")
    with (
        desk(tmp_path / "labels_of_the_second_reader", [slide], shipped, classes=CLASSES, model=shipped) as at,
        serving(at) as url,
        page_of(browser, reader) as page,
    ):
        page.goto(url)
        ready(page)
        press(page, "1", "2", "Enter", "1", "s")
        until(page, "document.getElementById('suggestion').textContent.includes('%') || wsiLabel.single.patch.blind")
        assert misfits(page, reader) == []
        page.evaluate(
            """() => { const fault = document.getElementById('fault'); fault.hidden = false; fault.textContent =
            'wsi-label does not answer. If it has ended, start it again with the same slides, folder and --port 8123. '
            + 'Labels not saved: 3. This page sends them again automatically. They are lost if you close or reload it.';
            }"""
        )
        assert misfits(page, reader) == []
        page.evaluate("() => { document.getElementById('fault').hidden = true; }")
        for key in ("g", "1"):
            page.keyboard.press(key)
        until(page, "document.querySelectorAll('#patches img').length === 24", seconds=40)
        page.locator("#patches button").nth(3).click()
        assert misfits(page, reader) == []
        page.keyboard.press("?")
        assert misfits(page, reader) == []
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server
