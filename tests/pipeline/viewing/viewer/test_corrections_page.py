"""Corrections in a real browser: regions are selected and relabeled with the mouse and the keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.labeling.corrections import CORRECTION_EVENTS, corrections_file
from pipeline.labeling.event_file import EventFile
from tests.browser import audited_page, axe_findings, screenshot, until
from tests.pipeline.viewing.viewer.conftest import Site
from tests.pipeline.viewing.viewer.correcting import PURPLE_AT, come_back, saved, select_first
from tests.pipeline.viewing.viewer.screen import color_at, place_on_screen, said, settle, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Dialog, Page, Route

pytestmark = pytest.mark.full


def delay_answers(page: Page) -> None:
    """Delay everything that the page asks about the regions from now on."""
    page.evaluate(
        """() => { const { outlines } = wsiView; const request = outlines.request.bind(outlines);
        outlines.request = async (question) => {
          await new Promise((done) => setTimeout(done, 400)); return request(question); }; }"""
    )


def test_a_region_is_selected_relabeled_undone_and_exported(own_site: Site, page: Page, tmp_path: Path) -> None:
    show(page, own_site, "#x=640&y=416&zoom=0.7&map=0&outlines=0")
    page.keyboard.press("2")
    assert page.get_by_role("checkbox", name="class-1").is_checked() is False, "without correcting, 2 turns a class off"
    page.keyboard.press("2")
    page.keyboard.press("c")
    page.keyboard.press("1")
    said(page, "First select a region")
    assert saved(own_site) == []
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1, 0.08")
    page.keyboard.press("1")
    said(page, "Saved: class-0 (before: class-1), 0.08")
    assert saved(own_site) == [("class-1", "class-0")]
    assert page.get_by_role("button", name="class-0").get_attribute("aria-pressed") == "true"
    pink = own_site.results[0].run.classes[0].color
    page.wait_for_timeout(200)
    assert np.abs(color_at(page, *PURPLE_AT) - pink).max() < 60, "filled with its new class"
    screenshot(page, "viewer-correction", tmp_path, whole=False)
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert download.value.suggested_filename == "a.corrections.geojson"
    assert '"name":"class-0"' in Path(download.value.path()).read_text(encoding="utf-8")

    page.reload()
    settle(page)
    until(page, "wsiView.corrections.shapes.length === 1")
    page.keyboard.press("c")
    assert page.locator("#correction-count").inner_text() == "Corrected regions: 1"
    page.keyboard.press("z")
    said(page, "Undone")
    assert saved(own_site) == []
    page.keyboard.press("z")
    said(page, "Nothing to undo")
    page.keyboard.press("Escape")
    assert page.locator("#correction-tools").is_hidden()


def test_escape_right_after_n_ends_the_choice_and_not_the_corrections(own_site: Site, page: Page) -> None:
    show(page, own_site)
    page.keyboard.press("c")
    delay_answers(page)
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    page.wait_for_timeout(600)
    assert page.locator("#correction-tools").is_visible()
    assert page.locator("#selected-region").inner_text().startswith("none")
    page.keyboard.press("Escape")
    assert page.locator("#correction-tools").is_hidden()


def test_the_next_region_by_area_and_by_uncertainty_comes_into_view(own_site: Site, page: Page) -> None:
    show(page, own_site, "#x=100&y=100&zoom=3")
    page.keyboard.press("c")
    page.keyboard.press("n")
    said(page, "Selected: class-0, 0.5")
    settle(page)
    view = page.evaluate("() => wsiView.view()")
    assert (view["x"], view["y"]) == (pytest.approx(640, abs=30), pytest.approx(416, abs=30))
    page.keyboard.press("n")
    said(page, "Selected: class-1, 0.08")
    page.keyboard.press("1")
    said(page, "Saved")
    page.keyboard.press("n")
    said(page, "Selected: class-0, 0.5")
    page.keyboard.press("n")
    said(page, "No other region")
    page.keyboard.press("z")
    said(page, "Undone")
    page.keyboard.press("Shift+N")
    said(page, "Selected: class-1, 0.08")


def test_a_class_goes_to_the_region_that_was_chosen_before_it_also_if_the_region_is_not_shown_yet(
    own_site: Site, page: Page
) -> None:
    show(page, own_site, "#x=640&y=416&zoom=0.7")
    page.keyboard.press("c")
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1")
    delay_answers(page)
    page.keyboard.press("n")
    page.keyboard.press("2")
    page.keyboard.press("n")
    until(page, "wsiView.selection.corrected.size && !wsiView.selection.choice")
    assert saved(own_site) == [("class-0", "class-1")]
    assert page.evaluate("() => wsiView.selection.regions.map(({ label }) => label)") == [2]


def test_a_held_key_acts_once_and_the_class_that_a_region_has_is_not_saved_again(own_site: Site, page: Page) -> None:
    show(page, own_site, "#x=640&y=416&zoom=0.7")
    select_first(page)
    page.keyboard.press("2")
    said(page, "Saved: class-1")
    page.keyboard.press("2")
    said(page, "Unchanged: class-1 (before: class-0)")
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1")
    page.keyboard.press("1")
    said(page, "Saved: class-0")
    with EventFile(corrections_file(own_site.results[0].folder), CORRECTION_EVENTS) as events:
        assert len(events.read()) == 2
    for _ in range(5):
        page.keyboard.down("z")
    page.keyboard.up("z")
    said(page, "Undone")
    page.evaluate("() => wsiView.corrections.saving")
    assert saved(own_site) == [("class-0", "class-1")]
    x = page.evaluate("() => wsiView.osd.viewport.getBounds().x")
    for _ in range(3):
        page.keyboard.down("ArrowRight")
    page.keyboard.up("ArrowRight")
    moved = page.evaluate("() => { const { x, width } = wsiView.osd.viewport.getBounds(); return [x, width]; }")
    assert moved[0] - x > 0.5 * moved[1], "arrow keys repeat"


def test_a_late_answer_does_not_replace_a_newer_selection(own_site: Site, page: Page) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/uncertainty", hold)
    show(page, own_site, "#x=640&y=416&zoom=0.7")
    page.keyboard.press("Shift+N")
    page.wait_for_timeout(200)
    page.mouse.click(*place_on_screen(page, *PURPLE_AT))
    said(page, "Selected: class-1")
    view = page.evaluate("() => wsiView.view()")
    for route in held:
        route.continue_()
    question = "{ what: 'next', by: 'uncertainty', after: null, on: [true, true], skip: [] }"
    page.evaluate(f"() => wsiView.outlines.request({question})")
    assert page.locator("#selected-region").inner_text().startswith("class-1")
    assert page.evaluate("() => wsiView.view()") == view


def test_the_page_asks_before_it_is_left_while_corrections_are_being_saved(pair: Site, page: Page) -> None:
    held: list[Route] = []
    questions: list[str] = []

    def stay(dialog: Dialog) -> None:
        questions.append(dialog.type)
        dialog.dismiss()

    def hold(route: Route) -> None:
        held.append(route)

    page.on("dialog", stay)
    page.route("**/corrections", hold)
    show(page, pair, "#x=640&y=416&zoom=0.7")
    select_first(page)
    page.keyboard.press("2")
    page.keyboard.press("n")
    said(page, "Selected: class-1")
    page.keyboard.press("1")
    until(page, "document.getElementById('corrections-saved').textContent === 'Saving 2…'")
    page.locator("#slides").select_option(index=1)
    page.wait_for_timeout(500)
    assert questions == ["beforeunload"]
    assert page.url.startswith(pair.page)
    assert page.locator("#slides").input_value() == pair.results[0].id
    assert saved(pair) == []
    page.unroute("**/corrections")
    for route in held:
        route.continue_()
    until(page, "document.getElementById('corrections-saved').textContent.startsWith('Saved: class-0')")
    assert saved(pair) == [("class-0", "class-1"), ("class-1", "class-0")]
    page.locator("#slides").select_option(index=1)
    page.wait_for_url(f"**/{pair.results[1].id}/**")
    settle(page)
    assert questions == ["beforeunload"]


def test_the_table_shows_the_new_class_of_a_corrected_region(own_site: Site, page: Page) -> None:
    show(page, own_site)
    for key in ("c", "g", "n"):
        page.keyboard.press(key)
    said(page, "Selected: class-0")
    page.keyboard.press("2")
    until(page, "document.getElementById('rows').textContent.includes('class-1 (before: class-0)')")
    swatch = page.locator("#rows tr").first.locator(".swatch")
    color = "#{:02x}{:02x}{:02x}".format(*own_site.results[0].run.classes[1].color)
    assert swatch.evaluate("(one) => one.style.getPropertyValue('--class')") == color
    page.keyboard.press("z")
    until(page, "!document.getElementById('rows').textContent.includes('before')")


def test_a_page_shows_what_another_one_has_corrected_when_a_person_returns_to_it(own_site: Site, page: Page) -> None:
    other = page.context.new_page()
    for one in (page, other):
        show(one, own_site)
        select_first(one)
    other.keyboard.press("2")
    said(other, "Saved: class-1")
    assert page.locator("#correction-count").inner_text() == "Corrected regions: 0"
    come_back(page)
    until(page, "document.getElementById('correction-count').textContent === 'Corrected regions: 1'")
    until(page, "wsiView.corrections.shapes.length === 1")
    assert page.locator("#selected-region").inner_text().startswith("class-1 (before: class-0)")
    page.keyboard.press("z")
    said(page, "Undone")
    other.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    until(other, "document.getElementById('correction-count').textContent === 'Corrected regions: 0'")
    other.goto("about:blank")


def test_undo_in_one_tab_leaves_the_correction_of_another_tab_until_it_is_shown(own_site: Site, page: Page) -> None:
    other = page.context.new_page()
    for one in (page, other):
        show(one, own_site, "#x=640&y=416&zoom=0.7")
    select_first(page)
    page.keyboard.press("2")
    said(page, "Saved: class-1")
    other.keyboard.press("c")
    other.mouse.click(*place_on_screen(other, *PURPLE_AT))
    said(other, "Selected: class-1")
    other.keyboard.press("1")
    said(other, "Saved: class-0")
    page.keyboard.press("z")
    said(page, "NOT undone: your last correction was made in another tab.")
    both = [("class-0", "class-1"), ("class-1", "class-0")]
    assert saved(own_site) == both
    assert page.locator("#correction-count").inner_text() == "Corrected regions: 2"
    assert page.locator("#corrections-saved").inner_text() == (
        "NOT undone: your last correction was made in another tab. It is shown now. Press z again to undo it."
    )
    page.keyboard.press("z")
    said(page, "Undone")
    assert saved(own_site) == both[:1]
    other.goto("about:blank")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_tools_are_accessible_in_both_schemes_and_on_a_phone(
    browser: Browser, own_site: Site, tmp_path: Path, scheme: str
) -> None:
    with audited_page(browser, scheme) as opened:
        show(opened, own_site)
        opened.get_by_role("checkbox", name=re.compile("Correct regions")).check()
        assert axe_findings(opened) == []
        opened.keyboard.press("n")
        said(opened, "Selected")
        assert axe_findings(opened) == []
        screenshot(opened, f"viewer-correct-{scheme}", tmp_path, whole=False)
        opened.set_viewport_size({"width": 390, "height": 800})
        assert opened.evaluate("() => document.documentElement.scrollWidth") <= 390
        screenshot(opened, f"viewer-correct-{scheme}-phone", tmp_path, whole=False)
