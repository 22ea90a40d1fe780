"""The page of wsi-label in a real browser: both views, the keys, and what a screen reader gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models.bundle import Bundle
from pipeline.labeling.events import Labeled
from pipeline.labeling.folder import add_classes, merge_classes
from pipeline.labeling.store import EventStore
from tests.browser import audited_page, axe_findings, screenshot, until, watched_page
from tests.cases import full
from tests.pipeline.labeling.desks import desk, label_slide, save
from tests.pipeline.labeling.pages import held, press, ready, saved, serving, shown

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser, Page


def test_patches_are_labeled_with_the_keyboard_and_a_reload_goes_on_where_it_was(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped, model=shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        order = [patch.place.id for patch in at.session.upcoming(6)]
        assert shown(page) == order[0]
        press(page, "1", "Enter", "1", "2", "Enter", "1", "1", "Enter", "u", "a")
        assert [(one.answers, one.mark) for one in saved(folder)] == [
            ({1: "present", 2: "absent"}, "none"),
            ({1: "present", 2: "present"}, "none"),
            ({1: "absent", 2: "absent"}, "none"),
            ({}, "unsure"),
            ({}, "artifact"),
        ]
        assert [one.place.id for one in saved(folder)] == order[:5]
        assert page.locator("#announcement").inner_text() == "Saved: artifact"
        assert "Labeled patches\n3" in page.locator("#counts").inner_text()
        press(page, "z")
        assert saved(folder)[-1].kind == "undo"
        assert shown(page) == order[4]
        page.reload()
        ready(page)
        assert shown(page) == order[4]
        press(page, "Backspace", "Backspace")
        assert shown(page) == order[2]
        page.keyboard.press("Backspace")
        assert page.get_by_role("button", name="class-0").get_attribute("aria-pressed") == "true"
        press(page, "2", "Enter")
        assert saved(folder)[-1].answers == {1: "present", 2: "absent"}
        assert saved(folder)[-1].place.id == order[1]
        assert shown(page) == order[4]
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def test_a_class_that_was_added_while_the_page_was_open_gets_no_answer_before_it_is_shown(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        first = shown(page)
        with EventStore(folder / "labels.sqlite") as other:
            add_classes(other, "ann", ["necrosis"], {})
        press(page, "1", "Enter")
        assert saved(folder)[-1].answers == {1: "present", 2: "absent"}
        assert shown(page) == first, "it comes back, because it lacks an answer"
        press(page, "3", "Enter")
        assert saved(folder)[-1].answers == {1: "present", 2: "absent", 3: "present"}
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def test_the_page_asks_to_complete_a_patch_that_was_imported_in_part(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped) as at, serving(at) as url:
        place = next(at.session.unseen())
        with EventStore(folder / "labels.sqlite") as other:
            other.append("ann", [Labeled(place=place, answers={1: "present"}, view="import", reason="import")])
        page.goto(url)
        ready(page)
        assert shown(page) == place.id
        assert page.locator("#about").inner_text() == "64 µm · some classes have no answer yet · labeled before"
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_a_class_that_was_merged_while_its_patch_was_shown_counts_for_the_class_that_contains_it(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped, classes=("class-0", "class-1", "fat")) as at, serving(at) as url:
        requests = held(page)
        page.goto(url)
        ready(page)
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#stage .patch').complete")
        page.keyboard.press("3")
        with EventStore(folder / "labels.sqlite") as other:
            merge_classes(other, "ann", "fat", "class-1")
        requests[0].continue_()
        page.unroute("**/labels")
        ready(page)
        marked = page.locator("#answer [aria-pressed=true]")
        assert marked.inner_text().startswith("fat")
        press(page, "Enter")
        assert saved(folder)[-1].answers == {1: "absent", 2: "absent", 3: "present"}
        assert page.locator("#answer button").count() == 2
        page.keyboard.press("Backspace")
        assert marked.inner_text().startswith("class-1")
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_a_grid_of_a_class_that_was_merged_meanwhile_counts_for_the_class_that_contains_it(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    classes = ("class-0", "class-1", "fat")
    with desk(folder, slides[:1], shipped, classes=classes) as at, serving(at) as url:
        save(at, at.session.upcoming(1)[0], 3)
        requests = held(page)
        page.goto(url)
        ready(page)
        for key in ("1", "Enter", "g", "3"):
            page.keyboard.press(key)
        images = "[...document.querySelectorAll('#patches img')]"
        until(page, f"{images}.length === 24 && {images}.every((image) => image.complete)", seconds=40)
        with EventStore(folder / "labels.sqlite") as other:
            merge_classes(other, "ann", "fat", "class-1")
        requests[0].continue_()
        page.unroute("**/labels")
        until(page, "document.querySelectorAll('#grid-classes button').length === 2")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('grid-about').textContent === 'Choose a class.'")
        grid = [one for one in saved(folder) if one.view == "grid"]
        assert len(grid) >= 23, "a patch of the grid can be the one that was labeled meanwhile"
        assert all(one.answers == {1: "absent", 2: "absent", 3: "present"} for one in grid)
        assert at.session.counts().present == {1: 1, 2: 1 + len(grid)}
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def test_the_patch_lies_in_the_middle_of_its_dimmed_surroundings_and_is_marked_on_the_slide(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        patch, around, slide, marker = (
            page.locator(f"#{name}").bounding_box() for name in ("stage .patch", "stage .around", "thumbnail", "marker")
        )
        assert patch is not None
        assert around is not None
        assert patch["width"] == pytest.approx(around["width"] / 2, abs=1)
        assert patch["x"] - around["x"] == pytest.approx(around["width"] / 4, abs=1)
        assert patch["y"] - around["y"] == pytest.approx(around["height"] / 4, abs=1)
        assert float(page.evaluate("() => getComputedStyle(document.querySelector('.around')).opacity")) < 0.6
        place = at.session.upcoming(1)[0].place
        assert slide is not None
        assert marker is not None
        assert (marker["x"] - slide["x"]) / slide["width"] == pytest.approx(place.x_l0 / 1280, abs=0.02)
        assert (marker["y"] - slide["y"]) / slide["height"] == pytest.approx(place.y_l0 / 832, abs=0.02)
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_two_slides_with_the_same_file_name_have_their_own_pictures_and_are_named_with_their_folders(
    page: Page, tmp_path: Path, shipped: Bundle
) -> None:
    three = [tmp_path / name for name in ("c.svs", "a/scan.svs", "b/scan.svs")]
    for slide in three[1:]:
        slide.parent.mkdir()
    for seed, slide in enumerate(three):
        label_slide(slide, seed)
    with desk(tmp_path / "l", three, shipped) as at, serving(at) as url:
        page.goto(url)
        for title in ("c.svs", "a/scan.svs", "b/scan.svs"):
            ready(page)
            pictured = page.evaluate("() => document.getElementById('thumbnail').src.split('/').at(-2)")
            of_picture, of_patch = at.session.place(pictured), at.session.place(shown(page))
            assert of_picture is not None
            assert of_patch is not None
            assert of_picture.slide == of_patch.slide
            assert page.locator("#slide-name").inner_text() == title
            press(page, "Enter")
        assert page.locator("#by-slide dt").all_inner_texts() == ["c.svs", "a/scan.svs", "b/scan.svs"]
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.parametrize("scheme", ["light", full("dark")])
def test_the_grid_saves_what_is_not_excluded_and_both_views_are_accessible(
    browser: Browser,
    tmp_path: Path,
    slides: list[Path],
    shipped: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with (
        desk(folder, slides[:1], shipped, model=shipped) as at,
        serving(at) as url,
        audited_page(browser, scheme) as page,
    ):
        page.goto(url)
        ready(page)
        press(page, "1", "Enter", "2", "Enter", "1", "s")
        until(page, "document.getElementById('suggestion').textContent || wsiLabel.single.patch.blind")
        assert axe_findings(page) == []
        screenshot(page, f"label-single-{scheme}", tmp_path, whole=False)
        page.keyboard.press("g")
        page.keyboard.press("1")
        until(page, "document.querySelectorAll('#patches img').length === 24", seconds=40)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        page.locator("#patches button").nth(3).click()
        patches = page.evaluate("() => wsiLabel.grid.patches.map(({ id }) => id)")
        until(page, "[...document.querySelectorAll('#patches img')].every((image) => image.complete)")
        assert axe_findings(page) == []
        screenshot(page, f"label-grid-{scheme}", tmp_path, whole=False)
        page.keyboard.press("Enter")
        until(page, f"wsiLabel.grid.patches.length && wsiLabel.grid.patches[0].id !== '{patches[0]}'", seconds=40)
        grid = [one for one in saved(folder) if one.view == "grid"]
        assert [one.place.id for one in grid] == [p for i, p in enumerate(patches) if i not in (1, 3)]
        assert all(one.answers == {1: "present", 2: "absent"} and one.reason == "similar" for one in grid)
        page.set_viewport_size({"width": 390, "height": 800})
        page.keyboard.press("g")
        assert shown(page) == patches[1], "an excluded patch comes next in the single view"
        assert axe_findings(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        screenshot(page, f"label-phone-{scheme}", tmp_path)


def test_the_next_patch_does_not_wait_for_the_disk_but_the_word_saved_does(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped) as at, serving(at) as url:
        requests = held(page)
        page.goto(url)
        ready(page)
        order = [patch.place.id for patch in at.session.upcoming(4)]
        for keys in ("1", "Enter", "2", "Enter", "1"):
            until(page, "document.querySelector('#stage .patch').complete")
            page.keyboard.press(keys)
        assert shown(page) == order[2]
        assert page.locator("#saved").inner_text() == "Saving 2…"
        assert saved(folder) == []
        for count in (1, 2):
            while len(requests) < count:
                page.wait_for_timeout(20)
            assert page.locator("#saved").inner_text() == f"Saving {3 - count}…"
            requests[count - 1].continue_()
        until(page, "document.getElementById('saved').textContent === 'Saved: class-1'")
        assert [(one.place.id, one.answers[1]) for one in saved(folder)] == [
            (order[0], "present"), (order[1], "absent")
        ]  # fmt: skip
        assert shown(page) == order[2]
        assert page.get_by_role("button", name="class-0").get_attribute("aria-pressed") == "true"
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def test_a_label_that_is_not_saved_yet_is_the_last_one_for_back_and_undo(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        first, second, third = (patch.place.id for patch in at.session.upcoming(3))
        press(page, "1", "Enter")
        assert page.locator("#saved").inner_text() == "Saved: class-0"
        requests = held(page)
        for key in ("2", "Enter"):
            page.keyboard.press(key)
        assert page.locator("#saved").inner_text() == "Saving 1…", "the word was about the label before"
        assert shown(page) == third
        page.keyboard.press("Backspace")
        assert shown(page) == second
        assert page.get_by_role("button", name="class-1").get_attribute("aria-pressed") == "true"
        page.keyboard.press("Backspace")
        assert shown(page) == first
        page.keyboard.press("z")
        assert len(saved(folder)) == 1
        requests[0].continue_()
        ready(page)
        assert page.locator("#announcement").inner_text() == "Undone"
        assert [one.kind for one in saved(folder)] == ["label", "label", "undo"]
        assert shown(page) == second
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


def test_a_double_click_saves_one_patch(page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    folder = tmp_path / "l"
    with desk(folder, slides, shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        for name, mark in (("Save, next", "none"), ("Unsure", "unsure"), ("Artifact", "artifact")):
            page.get_by_role("button", name=name).dblclick()
            ready(page)
            assert [one.mark for one in saved(folder)][-1:] == [mark]
        assert len(saved(folder)) == 3
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_the_grid_keeps_exclusions_until_another_class_is_chosen(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with desk(folder, slides[:1], shipped) as at, serving(at) as url:
        for number, patch in enumerate(at.session.upcoming(2), start=1):
            save(at, patch, number)
        page.goto(url)
        ready(page)
        images = "[...document.querySelectorAll('#patches img')]"
        loaded = f"{images}.length === 24 && {images}.every((image) => image.complete)"
        excluded = page.locator("#patches [aria-pressed=true]")
        page.keyboard.press("g")
        page.keyboard.press("1")
        until(page, loaded, seconds=40)
        for number in (1, 3):
            page.locator("#patches button").nth(number).click()
        marked = excluded.evaluate_all("(buttons) => buttons.map((button) => button.ariaLabel)")
        page.keyboard.press("g")
        page.keyboard.press("g")
        until(page, loaded)
        assert excluded.evaluate_all("(buttons) => buttons.map((button) => button.ariaLabel)") == marked
        page.keyboard.press("Enter")
        until(page, "document.getElementById('saved').textContent === 'Saved: 22 patches'")
        page.keyboard.press("2")
        until(page, loaded)
        assert excluded.count() == 0
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_the_keyboard_focus_stays_where_it_is_in_a_grid_without_patches_and_at_the_last_patch_of_back(
    page: Page, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    focused = "() => document.activeElement.id || document.activeElement.textContent"
    with desk(tmp_path / "l", slides[:1], shipped) as at, serving(at) as url:
        page.goto(url)
        ready(page)
        press(page, "1", "Enter", "g")
        page.locator("#grid-classes button").nth(1).focus()
        page.keyboard.press("Space")
        until(page, "document.getElementById('grid-about').textContent.startsWith('First label a patch')")
        assert str(page.evaluate(focused)).startswith("class-1")
        page.keyboard.press("g")
        page.locator("#back").focus()
        press(page, "Space")
        assert page.locator("#back").get_attribute("aria-disabled") == "true"
        assert page.evaluate(focused) == "back"
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server


@pytest.mark.full
def test_long_names_fit_on_a_phone_the_buttons_keep_their_place_and_pressed_ones_differ_in_forced_colors(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    classes = ("tumor_associated_stroma_with_lymphocytes_of_high_grade", "other")
    with (
        desk(tmp_path / "l", slides[:1], shipped, classes=classes) as at,
        serving(at) as url,
        watched_page(browser, width=360, height=640, forced_colors="active") as page,
    ):
        page.goto(url)
        ready(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        page.keyboard.press("1")
        colors = [
            page.locator(f"#{name}").evaluate("(one) => getComputedStyle(one).backgroundColor")
            for name in ("view-single", "view-grid")
        ]
        assert colors[0] != colors[1]
        tops = "() => document.getElementById('save').getBoundingClientRect().top"
        top = page.evaluate(tops)
        for text in ("", "64 µm · blind: labeled by every annotator, without suggestions"):
            page.evaluate("(text) => { document.getElementById('about').textContent = text; }", text)
            assert page.evaluate(tops) == pytest.approx(top, abs=1)
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server
