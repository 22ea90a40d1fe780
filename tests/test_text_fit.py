"""The check of texts finds what readers could not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.text_fit import READERS, SIZES, Reader, misfits, page_of

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser

FITTING = "<p id=first>One text.</p><p>Another text.</p>"


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FITTING, None),
        (
            "<p id=cut style='height: 10px; overflow: hidden'>Text</p>",
            'p#cut "Text" ends outside p#cut',
        ),
        (
            "<p id=under>Text</p><p id=over style='position: absolute; left: 8px; top: 8px; margin: 0'>Words</p>"
            "<style>p { margin: 0 !important; }</style>",
            'p#under "Text" overlaps p#over "Words"',
        ),
        ("<p id=wide style='width: 2000px'>Text</p>", "the page is 2008 px wide: p#wide"),
    ],
    ids=["fits", "cut", "overlaps", "wide"],
)
def test_text_that_is_cut_off_overlaps_or_is_too_wide_is_found(
    browser: Browser, reader: Reader, content: str, expected: str | None
) -> None:
    with page_of(browser, reader) as page:
        page.set_content(f"<!doctype html><body style='margin: 8px'>{content}")
        found = misfits(page, reader)
    sizes = [f"{width}×{height}: " for width, height in SIZES[reader]]
    if expected is None:
        assert found == []
    else:
        assert [size for size in sizes if size + expected in found] == sizes, found


@pytest.mark.full
def test_text_that_ignores_the_font_size_of_the_browser_is_found(browser: Browser) -> None:
    with page_of(browser, "twice") as page:
        page.set_content(f"<!doctype html><body style='font-size: 16px'>{FITTING}")
        assert misfits(page, "twice") == ["the text does not follow the font size of the browser"]
