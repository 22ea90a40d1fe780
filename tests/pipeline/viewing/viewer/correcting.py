"""Correct regions on the page, and read what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.labeling.corrections import read_corrections
from tests.pipeline.viewing.viewer.conftest import Site
from tests.pipeline.viewing.viewer.screen import said

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

PURPLE_AT = (560, 400)


def saved(site: Site) -> list[tuple[str, str]]:
    return [(one.event.before, one.event.after) for one in read_corrections(site.results[0].folder)]


def select_first(page: Page) -> None:
    """Turn corrections on, and select the largest region."""
    page.keyboard.press("c")
    page.keyboard.press("n")
    said(page, "Selected: class-0")


def come_back(page: Page) -> None:
    page.evaluate("() => { window.dispatchEvent(new Event('focus')); }")


def notes(page: Page) -> list[str]:
    page.evaluate("() => wsiView.corrections.saving")
    return page.locator("#notes p").all_inner_texts()
