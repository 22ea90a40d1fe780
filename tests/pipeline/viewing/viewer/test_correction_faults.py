"""Corrections in a real browser when requests fail, answers are lost, or the result is another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.formats.features import read_features
from pipeline.labeling.corrections import CORRECTION_EVENTS, corrections_file, relabeled
from pipeline.labeling.event_file import EventFile
from pipeline.viewing.viewer.results import find_results
from tests.browser import failing_page, until
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.correcting import PURPLE_AT, come_back, notes, saved, select_first
from tests.pipeline.viewing.viewer.screen import place_on_screen, said, settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Route

pytestmark = pytest.mark.full


def test_a_server_that_is_gone_is_reported_and_nothing_counts_as_saved(
    browser: Browser, results_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(next(results_folder.glob("block*")), tmp_path / "results" / "a")
    with failing_page(browser) as opened:
        with serving(find_results(tmp_path / "results")) as gone:
            show(opened, gone, "#x=640&y=416&zoom=0.7")
            opened.keyboard.press("c")
            opened.mouse.click(*place_on_screen(opened, *PURPLE_AT))
            said(opened, "Selected: class-1")
        opened.keyboard.press("1")
        until(opened, "document.querySelectorAll('#notes p').length === 2")
        assert notes(opened) == [
            "wsi-view did not answer, so it is not known whether this was saved. Check the corrected regions.",
            "wsi-view has ended. Start it again, then reload the page.",
        ]
        assert opened.locator("#corrections-saved").inner_text() == ""
        assert saved(gone) == []


def test_a_page_of_another_result_neither_shows_nor_undoes_corrections_after_a_restart(
    browser: Browser, results_folder: Path, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        shutil.copytree(next(results_folder.glob("block*")), tmp_path / folder / "a")
    text = "The result has changed; reload the page."
    with failing_page(browser) as opened:
        with serving(find_results(tmp_path / "one")) as one:
            show(opened, one, "#x=640&y=416&zoom=0.7")
        with serving(find_results(tmp_path / "two"), one.port) as two:
            with EventFile(corrections_file(two.results[0].folder), CORRECTION_EVENTS) as events:
                region = next(read_features(two.results[0].outlines, two.results[0].run.classes))
                events.append("ann", [relabeled(region, "0" * 64, "0" * 64, "class-1")])
            opened.keyboard.press("c")
            opened.keyboard.press("z")
            until(opened, f"document.getElementById('notes').textContent.includes('NOT saved: {text}')")
            assert len(saved(two)) == 1
            opened.mouse.move(*place_on_screen(opened, *PURPLE_AT))
            until(opened, f"[...document.querySelectorAll('#notes p')].some((one) => one.textContent === '{text}')")
            assert "class-" not in opened.locator("#values").inner_text()
            opened.reload()
            settle(opened)
            assert notes(opened) == []
            assert opened.locator("#correction-count").text_content() == "Corrected regions: 1"


def test_after_a_restart_with_another_annotator_the_page_states_both_and_saves_nothing(
    browser: Browser, results_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(next(results_folder.glob("block*")), tmp_path / "results" / "a")
    text = "wsi-view now runs with --annotator bo, and this page was loaded with ann. Reload the page to save as bo."
    with failing_page(browser) as opened:
        with serving(find_results(tmp_path / "results")) as first:
            show(opened, first)
            select_first(opened)
        with serving(find_results(tmp_path / "results"), first.port, "bo") as second:
            come_back(opened)
            until(opened, f"document.getElementById('notes').textContent.includes('{text}')")
            opened.keyboard.press("2")
            until(opened, f"document.getElementById('notes').textContent.includes('NOT saved: {text}')")
            assert saved(second) == []
            opened.reload()
            settle(opened)
            assert notes(opened) == []
            select_first(opened)
            opened.keyboard.press("2")
            said(opened, "Saved: class-1")
            assert saved(second) == [("class-0", "class-1")]
            opened.goto("about:blank")


def test_only_the_last_failure_is_shown_until_something_is_saved(own_site: Site, browser: Browser) -> None:
    with failing_page(browser) as page:
        show(page, own_site)
        select_first(page)
        page.route("**/corrections", lambda route: route.fulfill(status=507, body="The disk is full."))
        for _ in range(2):
            page.keyboard.press("2")
            page.wait_for_timeout(200)
            page.evaluate("() => wsiView.corrections.saving")
        assert page.locator("#notes p").all_inner_texts() == ["NOT saved: The disk is full."]
        page.unroute("**/corrections")
        page.keyboard.press("2")
        said(page, "Saved: class-1")
        assert page.locator("#notes p").count() == 0
        page.goto("about:blank")


def test_a_note_that_corrections_cannot_be_read_disappears_when_they_can(own_site: Site, browser: Browser) -> None:
    with failing_page(browser) as page:
        show(page, own_site)
        damaged = "document.getElementById('notes').textContent.includes('The file is damaged.')"
        page.route("**/corrections.json", lambda route: route.fulfill(status=500, body="The file is damaged."))
        come_back(page)
        until(page, damaged)
        page.unroute("**/corrections.json")
        come_back(page)
        until(page, f"!{damaged}")
        page.route("**/corrections.json", lambda route: route.fulfill(status=500, body="The file is damaged."))
        come_back(page)
        until(page, damaged)
        select_first(page)
        page.route("**/corrections", lambda route: route.fulfill(status=507, body="The disk is full."))
        page.keyboard.press("2")
        until(page, "document.getElementById('notes').textContent.includes('NOT saved')")
        page.unroute("**/corrections.json")
        come_back(page)
        until(page, f"!{damaged}")
        assert notes(page) == ["NOT saved: The disk is full."], "until a correction is saved"
        page.goto("about:blank")


def test_after_an_answer_that_cannot_be_read_corrections_are_saved_and_undone_as_before(
    own_site: Site, browser: Browser
) -> None:
    with failing_page(browser) as page:
        show(page, own_site)
        select_first(page)
        broken = "The answer of wsi-view cannot be read. Reload the page to see what is saved."
        page.route("**/corrections.json", lambda route: route.fulfill(body='{"correc'))
        come_back(page)
        until(page, f"document.getElementById('notes').textContent === '{broken}'")
        page.route("**/corrections", lambda route: route.fulfill(body='{"correc'))
        page.keyboard.press("2")
        until(page, "document.querySelectorAll('#notes p').length === 2")
        assert notes(page) == [broken, broken]
        page.unroute("**/corrections")
        page.keyboard.press("2")
        said(page, "Saved: class-1")
        assert notes(page) == []
        assert saved(own_site) == [("class-0", "class-1")]
        page.keyboard.press("z")
        said(page, "Undone")
        assert saved(own_site) == []
        page.goto("about:blank")


def test_a_correction_whose_answer_is_lost_is_shown_once_it_is_read_again(own_site: Site, browser: Browser) -> None:
    def lose(route: Route) -> None:
        sent = route.request
        page.request.fetch(sent.url, method="POST", headers=sent.all_headers(), data=sent.post_data)
        route.abort()

    with failing_page(browser) as page:
        show(page, own_site)
        select_first(page)
        page.route("**/corrections", lose, times=1)
        page.keyboard.press("2")
        until(page, "document.getElementById('correction-count').textContent === 'Corrected regions: 1'")
        assert notes(page) == [
            "wsi-view did not answer, so it is not known whether this was saved. Check the corrected regions."
        ]
        page.keyboard.press("2")
        said(page, "Unchanged: class-1")
        page.keyboard.press("z")
        said(page, "Undone")
        assert saved(own_site) == []
        page.goto("about:blank")


@pytest.mark.parametrize("cut", ["uncertainty", "outlines/*"])
def test_corrections_are_read_saved_and_undone_also_if_the_page_gets_no_regions(
    own_site: Site, browser: Browser, cut: str
) -> None:
    with failing_page(browser) as page:
        show(page, own_site)
        select_first(page)
        page.keyboard.press("2")
        said(page, "Saved: class-1")
        page.route(f"**/{cut}", lambda route: route.fulfill(body="cut"))
        page.reload()
        until(page, "window.wsiView && wsiView.selection.corrected.size")
        page.keyboard.press("c")
        page.keyboard.press("Shift+N")
        said(page, "No other region")
        page.keyboard.press("1")
        said(page, "First select a region")
        page.keyboard.press("z")
        said(page, "Undone")
        assert saved(own_site) == []
        assert any("cannot be read. The terminal shows the reason" in text for text in notes(page))
        page.goto("about:blank")
