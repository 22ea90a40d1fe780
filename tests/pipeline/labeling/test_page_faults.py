"""The page of wsi-label when requests fail, pictures are missing, or answers are late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.bundle import Bundle
from tests.browser import until
from tests.pipeline.labeling.desks import desk
from tests.pipeline.labeling.pages import ready, saved, serving, shown

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser


def test_the_page_says_that_the_server_is_gone_and_does_not_go_on(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        with desk(tmp_path / "l", slides[:1], shipped) as at:
            with serving(at) as url:
                page.goto(url)
                ready(page)
                first = shown(page)
            page.keyboard.press("1")
            page.keyboard.press("Enter")
            until(page, "!document.getElementById('fault').hidden")
            assert "Start wsi-label again" in page.locator("#fault").inner_text()
            assert shown(page) == first
            assert page.get_by_role("button", name="class-0").get_attribute("aria-pressed") == "true"
            assert saved(tmp_path / "l") == []


def test_an_error_of_the_grid_disappears_when_another_class_can_be_compared(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with (
        browser.new_context() as context,
        desk(tmp_path / "l", slides[:1], shipped) as at,
        serving(at) as url,
    ):
        page = context.new_page()
        page.goto(url)
        ready(page)
        page.route("**/grid", lambda route: route.fulfill(status=500, body="Internal error"), times=1)
        page.keyboard.press("g")
        page.keyboard.press("1")
        until(page, "!document.getElementById('fault').hidden")
        page.keyboard.press("2")
        until(page, "document.getElementById('grid-about').textContent.startsWith('First label a patch')")
        assert page.locator("#fault").is_hidden()
