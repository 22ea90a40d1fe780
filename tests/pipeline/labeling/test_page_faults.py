"""The page of wsi-label when requests fail, pictures are missing, or answers are late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from models.bundle import Bundle
from tests.browser import failing_page, until
from tests.pipeline.labeling.desks import desk, save
from tests.pipeline.labeling.pages import held, lose_answers, press, ready, saved, serving, shown

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser, Page, Route


def test_the_page_says_that_the_server_is_gone_and_asks_before_it_loses_labels(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with failing_page(browser) as page, desk(tmp_path / "l", slides[:1], shipped) as at:
        with serving(at) as url:
            page.goto(url)
            ready(page)
            first, second = (patch.place.id for patch in at.session.upcoming(2))
            assert shown(page) == first
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        until(page, "!document.getElementById('fault').hidden")
        assert page.locator("#fault").inner_text() == (
            "wsi-label does not answer. If it has ended, start it again with the same slides, folder and --port "
            f"{urlsplit(url).port}. Labels not saved: 1. This page sends them again automatically. They are lost if "
            "you close or reload it."
        )
        assert shown(page) == second
        assert saved(tmp_path / "l") == []
        with page.expect_event("dialog") as asked:
            page.evaluate("() => void setTimeout(() => location.reload())")
            page.once("dialog", lambda dialog: dialog.dismiss())
        assert asked.value.type == "beforeunload"
        assert shown(page) == second


def test_an_error_of_the_grid_disappears_when_another_class_can_be_compared(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with (
        failing_page(browser) as page,
        desk(tmp_path / "l", slides[:1], shipped) as at,
        serving(at) as url,
    ):
        page.goto(url)
        ready(page)
        page.route("**/grid", lambda route: route.fulfill(status=500, body="Internal error"), times=1)
        page.keyboard.press("g")
        page.keyboard.press("1")
        until(page, "!document.getElementById('fault').hidden")
        page.keyboard.press("2")
        until(page, "document.getElementById('grid-about').textContent.startsWith('First label a patch')")
        assert page.locator("#fault").is_hidden()


def test_a_patch_whose_picture_is_not_loaded_gets_no_answer_and_can_be_loaded_again_or_skipped(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        page.route("**/patch.jpg", lambda route: route.fulfill(status=503))
        page.goto(url)
        cannot = "document.getElementById('wait')?.textContent.includes('cannot be loaded')"
        until(page, cannot)
        first, second = (patch.place.id for patch in at.session.upcoming(2))
        page.keyboard.press("u")
        until(page, f"wsiLabel.single.patch?.id === '{second}' && {cannot}")
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        assert page.locator("#fault").inner_text() == "NOT saved: the picture of this patch is not loaded."
        until(page, cannot)
        page.unroute("**/patch.jpg")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#stage .patch')?.naturalWidth")
        assert [(one.place.id, one.mark) for one in saved(folder)] == [(first, "unsure")]
        press(page, "Enter")
        assert [(one.place.id, one.answers) for one in saved(folder)[1:]] == [(second, {1: "present", 2: "absent"})]
        assert page.locator("#fault").is_hidden()


def test_the_grid_does_not_save_patches_whose_pictures_are_not_loaded(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_half(route: Route) -> None:
        if route.request.url.split("/")[-2] < "8":
            route.fulfill(status=503)
        else:
            route.continue_()

    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        save(at, at.session.upcoming(1)[0], 1)
        page.route("**/patch.jpg", lambda route: route.fulfill(status=503))
        page.goto(url)
        until(page, "window.wsiLabel?.single.patch")
        page.keyboard.press("g")
        page.keyboard.press("1")
        images = "[...document.querySelectorAll('#patches img')]"
        until(page, f"{images}.length && {images}.every((image) => image.alt)", seconds=40)
        page.keyboard.press("Enter")
        assert page.locator("#fault").inner_text() == "NOT saved: no picture is loaded."
        page.route("**/patch.jpg", lose_half)
        page.keyboard.press("1")
        until(page, f"{images}.some((image) => image.naturalWidth) && {images}.every((image) => image.complete)")
        loaded = page.evaluate(
            f"() => wsiLabel.grid.patches.filter((_, i) => {images}[i].naturalWidth).map(({{ id }}) => id)"
        )
        assert 0 < len(loaded) < 24
        assert page.locator("#fault").inner_text() == "Some pictures cannot be loaded. Their patches will not be saved."
        page.keyboard.press("Enter")
        until(page, f"document.getElementById('saved').textContent === 'Saved: {len(loaded)} patches'")
        assert [one.place.id for one in saved(folder) if one.view == "grid"] == loaded


def test_labels_that_could_not_be_saved_are_sent_again_in_their_order(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        old, first, second = (patch.place.id for patch in at.session.upcoming(3))
        press(page, "1", "Enter")
        requests = held(page)
        for key in ("1", "Enter", "Backspace", "Backspace", "2", "Enter", "u"):
            until(page, "document.querySelector('#stage .patch').complete")
            page.keyboard.press(key)
        requests[0].fulfill(status=507, body="NOT saved; see the terminal for the reason.")
        page.unroute("**/labels")
        until(page, "!document.getElementById('fault').hidden")
        assert page.locator("#fault").inner_text() == (
            "NOT saved; see the terminal for the reason. "
            "Labels not saved: 3. They are lost if you close or reload this page."
        )
        assert page.locator("#saved").inner_text() == ""
        assert shown(page) == first
        page.keyboard.press("2")
        press(page, "Enter")
        both = {1: "present", 2: "present"}
        assert [(one.place.id, one.answers, one.mark) for one in saved(folder)[1:]] == [
            (first, both, "none"), (old, both, "none"), (second, {}, "unsure"),
        ]  # fmt: skip
        assert page.locator("#fault").is_hidden()
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_undo_in_the_grid_waits_for_the_labels_of_the_single_view(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        first, second = (patch.place.id for patch in at.session.upcoming(2))
        press(page, "1", "Enter")
        requests = held(page)
        for key in ("2", "Enter", "g", "z"):
            page.keyboard.press(key)
        requests[0].fulfill(status=507, body="NOT saved; see the terminal for the reason.")
        page.unroute("**/labels")
        until(page, "!document.getElementById('fault').hidden && !wsiLabel.grid.busy")
        assert [one.kind for one in saved(folder)] == ["label"], "the label before is not the last one"
        page.keyboard.press("z")
        until(page, "document.getElementById('announcement').textContent === 'Undone'")
        assert [one.place.id for one in saved(folder)[:2]] == [first, second]
        assert [one.kind for one in saved(folder)] == ["label", "label", "undo"]
        page.keyboard.press("g")
        assert shown(page) == second
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_keys_do_nothing_before_the_server_has_answered(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides[:1], shipped) as at, serving(at) as url:
        requests: list[Route] = []
        page.route("**/state.json", lambda route: requests.append(route))  # noqa: PLW0108 - Playwright needs a function of Python
        page.goto(url, wait_until="commit")
        until(page, "window.wsiLabel")
        for key in ("1", "Backspace", "Enter", "u", "s", "g", "1", "Enter", "g"):
            page.keyboard.press(key)
        requests[0].continue_()
        ready(page)
        assert shown(page) == at.session.upcoming(1)[0].place.id
        assert saved(tmp_path / "l") == []
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


COVERED = """() => ['back', 'save', 'unsure', 'artifact', 'undo'].filter((id) => {
  const button = document.getElementById(id);
  button.scrollIntoView({ block: 'nearest' });
  const box = button.getBoundingClientRect();
  const top = document.elementFromPoint(box.left + box.width / 2, box.top + 4);
  return !button.contains(top) || box.bottom > innerHeight + 1; })"""
"""Returns the buttons that are not on top of the page at their upper edge after the page has scrolled to them."""


@pytest.mark.full
def test_the_message_about_labels_that_are_not_saved_covers_no_button_at_any_size(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with failing_page(browser) as page, desk(tmp_path / "l", slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        page.route("**/labels", lambda route: route.abort())
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        until(page, "!document.getElementById('fault').hidden")
        for width, height in ((1920, 1080), (1280, 720), (1024, 768), (768, 1024), (640, 400), (360, 640), (320, 256)):
            page.set_viewport_size({"width": width, "height": height})
            page.evaluate("() => scrollTo(0, 0)")
            assert page.evaluate(COVERED) == [], f"{width}×{height}"
            bar = page.locator("#fault").bounding_box()
            assert bar is not None
            assert 0 <= bar["y"] < height, f"{width}×{height}: the message stays in sight"
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def open_grid(page: Page, url: str) -> None:
    """Open the page, and the grid of the first class."""
    page.goto(url)
    ready(page)
    page.keyboard.press("g")
    page.keyboard.press("1")
    images = "[...document.querySelectorAll('#patches img')]"
    until(page, f"{images}.length === 24 && {images}.every((image) => image.complete)", seconds=40)


def asks_before_leaving(page: Page) -> bool:
    with page.expect_event("dialog", timeout=2000) as asked:
        page.evaluate("() => void setTimeout(() => location.reload())")
        page.once("dialog", lambda dialog: dialog.dismiss())
    return str(asked.value.type) == "beforeunload"


@pytest.mark.full
def test_a_grid_that_could_not_be_saved_is_counted_and_sent_again_with_the_next_label(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        save(at, at.session.upcoming(1)[0], 1)
        open_grid(page, url)
        patches = page.evaluate("() => wsiLabel.grid.patches.map(({ id }) => id)")
        about = page.locator("#grid-about").inner_text()
        page.locator("#patches button").nth(1).click()
        requests = held(page)
        page.keyboard.press("Enter")
        until(page, "document.getElementById('grid-about').textContent === 'Saving…'")
        page.locator("#patches button").nth(2).click()
        assert page.locator("#patches [aria-pressed=true]").count() == 1, "what is being saved cannot change"
        assert asks_before_leaving(page)
        requests[0].fulfill(status=507, body="NOT saved; see the terminal for the reason.")
        until(page, "!document.getElementById('fault').hidden")
        fault = "Labels not saved: 23. They are lost if you close or reload this page."
        assert page.locator("#fault").inner_text().endswith(fault)
        assert page.locator("#grid-about").inner_text() == about
        page.locator("#patches button").nth(2).click()
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        requests[1].fulfill(status=507, body="NOT saved; see the terminal for the reason.")
        until(page, "!document.getElementById('fault').hidden && !wsiLabel.grid.busy")
        assert page.locator("#fault").inner_text().endswith(fault.replace("23", "22"))
        assert asks_before_leaving(page)
        page.unroute("**/labels")
        assert [one.view for one in saved(folder)] == ["single"]
        page.keyboard.press("g")
        single = shown(page)
        assert single not in patches[:1] + patches[3:]
        page.keyboard.press("2")
        press(page, "Enter")
        grid = [patch for i, patch in enumerate(patches) if i not in (1, 2)]
        assert [one.place.id for one in saved(folder)[1:]] == [*grid, single]
        assert page.locator("#fault").is_hidden()
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_after_a_lost_answer_a_label_is_saved_once_and_undone_once(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    gone = "!document.getElementById('fault').hidden"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        first, second = (patch.place.id for patch in at.session.upcoming(2))
        press(page, "1", "Enter")
        lose_answers(page, "/labels")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        until(page, gone)
        ready(page)
        assert page.locator("#saved").inner_text() == "Saved: class-1"
        assert [one.place.id for one in saved(folder)] == [first, second]
        lose_answers(page, "/undo")
        page.keyboard.press("z")
        until(page, gone)
        press(page, "z")
        assert page.locator("#announcement").inner_text() == "Undone"
        assert [one.kind for one in saved(folder)] == ["label", "label", "undo"]
        assert (shown(page), page.evaluate("() => wsiLabel.single.state.counts.labeled")) == (second, 1)
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_undo_in_one_tab_leaves_the_label_of_another_tab(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        other = page.context.new_page()
        for one in (page, other):
            one.goto(url)
            ready(one)
            press(one, "1", "Enter")
        page.keyboard.press("z")
        until(page, "!document.getElementById('fault').hidden")
        assert page.locator("#fault").inner_text() == (
            "NOT undone: your last label was made in another tab. Reload this page to see it."
        )
        assert [one.kind for one in saved(folder)] == ["label", "label"]
        page.reload()
        ready(page)
        press(page, "z")
        assert [one.kind for one in saved(folder)] == ["label", "label", "undo"]
        for one in (page, other):
            one.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_a_label_whose_answer_was_lost_and_that_another_tab_has_undone_is_saved_when_it_is_sent_again(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        first = shown(page)
        requests = held(page)
        lose_answers(page, "/labels")
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        until(page, "!document.getElementById('fault').hidden")
        other = page.context.new_page()
        other.goto(url)
        ready(other)
        press(other, "z")
        while not requests:  # until the page sends the label again
            page.wait_for_timeout(20)
        requests[0].continue_()
        ready(page)
        assert page.locator("#saved").inner_text() == "Saved: class-0"
        assert [one.kind for one in saved(folder)] == ["label", "undo", "label"]
        assert [patch.place.id for patch in at.session.history()] == [first]
        for one in (page, other):
            one.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_a_grid_behind_a_label_that_is_refused_can_be_saved_again(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        save(at, at.session.upcoming(1)[0], 1)
        page.goto(url)
        ready(page)
        single = shown(page)
        refusal = "NOT saved; see the terminal for the reason."
        page.route("**/labels", lambda route: route.fulfill(status=507, body=refusal))
        for key in ("1", "Enter", "g", "1"):
            page.keyboard.press(key)
        images = "[...document.querySelectorAll('#patches img')]"
        until(page, f"{images}.length && {images}.every((image) => image.complete)", seconds=40)
        # The answer of the grid's request makes the page send the label again.
        until(page, "!wsiLabel.orders.sending && !document.getElementById('fault').hidden")
        grid = page.evaluate("() => wsiLabel.grid.patches.map(({ id }) => id)")
        about = page.locator("#grid-about").inner_text()
        page.keyboard.press("Enter")
        until(page, f"document.getElementById('fault').textContent.includes('not saved: {1 + len(grid)}')")
        until(page, "!document.getElementById('grid-save').disabled")
        assert page.locator("#grid-about").inner_text() == about
        page.unroute("**/labels")
        page.keyboard.press("Enter")
        until(page, f"document.getElementById('saved').textContent === 'Saved: {len(grid)} patches'")
        assert [one.place.id for one in saved(folder)[1:]] == [single, *grid]
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server
