"""The page of wsi-label when its server is killed and started again, takes seconds, or has other plans meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from models.bundle import Bundle
from pipeline.labeling.events import Labeled
from pipeline.labeling.store import EventStore
from tests.browser import failing_page, until
from tests.pipeline.labeling.desks import desk, save
from tests.pipeline.labeling.pages import held, lose_answers, press, ready, saved, serving, shown
from tests.pipeline.labeling.sessions import started

if TYPE_CHECKING:  # most test runs do not need a browser
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full


@contextmanager
def killed_at_the_end(slides: list[Path], folder: Path, port: int = 0) -> Iterator[str]:
    """Run wsi-label in a process of its own. Yield its address, and kill it with SIGKILL at the end."""
    with started(*slides, "-o", folder, "--classes", "a,b", "--patch-side", "64", "--port", str(port)) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.kill()
            process.communicate()


def label_next(page: Page, key: str) -> str:
    """Mark what is shown, and go to the next patch. Return the id of the labeled one."""
    until(page, "document.querySelector('#stage .patch')?.complete")
    labeled = shown(page)
    page.keyboard.press(key)
    if key.isdigit():
        page.keyboard.press("Enter")
    return labeled


def test_labels_that_are_made_while_the_server_is_gone_are_saved_once_after_a_restart_on_the_same_port(
    browser: Browser, tmp_path: Path, slides: list[Path]
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page:
        with killed_at_the_end(slides, folder) as url:
            page.goto(url)
            ready(page)
            first = label_next(page, "1")
            ready(page)
            lose_answers(page, "/labels")
            made = [first, label_next(page, "2")]
            until(page, "!document.getElementById('fault').hidden")
            port = urlsplit(url).port
        assert port is not None
        made += [label_next(page, key) for key in ("u", "1")]
        said = "document.getElementById('fault').textContent"
        until(page, f"{said}.includes('not saved: 3')")
        assert page.locator("#fault").inner_text() == (
            "wsi-label does not answer. If it has ended, start it again with the same slides, folder and --port "
            f"{port}. Labels not saved: 3. This page sends them again automatically. They are lost if you "
            "close or reload it."
        )
        assert [one.place.id for one in saved(folder)] == made[:2]
        page.keyboard.press("1")
        working = shown(page)
        with killed_at_the_end(slides, folder, port):
            until(page, "!wsiLabel.orders.pending.length", seconds=60)
            assert page.locator("#fault").is_hidden()
            assert page.locator("#saved").inner_text() == "Saved: a"
            assert shown(page) == working
            assert page.get_by_role("button", name="a 1").get_attribute("aria-pressed") == "true"
            assert [one.place.id for one in saved(folder)] == made
            press(page, "z")
            assert [one.kind for one in saved(folder)] == ["label"] * 4 + ["undo"]
            assert shown(page) == made[-1]
            page.goto("about:blank")


def test_a_grid_that_is_saved_while_the_server_is_gone_is_saved_once_after_a_restart(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "l"
    monkeypatch.setattr("pipeline.labeling.app.POOL", 60)  # the network takes a second for these
    with failing_page(browser) as page:
        with desk(folder, slides[:1], shipped) as at, serving(at) as url:
            save(at, at.session.upcoming(1)[0], 1)
            page.goto(url)
            ready(page)
            page.keyboard.press("g")
            page.keyboard.press("1")
            until(page, "document.querySelectorAll('#patches img').length === 24", seconds=40)
            images = "[...document.querySelectorAll('#patches img')]"
            until(page, f"{images}.every((image) => image.complete)")
            grid = page.evaluate("() => wsiLabel.grid.patches.map(({ id }) => id)")
        page.keyboard.press("Enter")
        until(page, "!document.getElementById('fault').hidden")
        assert "Labels not saved: 24." in page.locator("#fault").inner_text()
        assert page.locator("#grid-about").inner_text() == "Saving…"
        page.keyboard.press("Enter")
        with desk(folder, slides[:1], shipped) as at, serving(at, urlsplit(url).port or 0):
            until(page, "document.getElementById('saved').textContent === 'Saved: 24 patches'", seconds=40)
            assert [one.place.id for one in saved(folder)[1:]] == grid
            until(page, f"wsiLabel.grid.patches.length && wsiLabel.grid.patches[0].id !== '{grid[0]}'", seconds=40)
            page.goto("about:blank")


def test_the_page_of_another_person_keeps_its_labels_instead_of_saving_them_for_the_wrong_one(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page:
        with desk(folder, slides[:1], shipped) as at, serving(at) as url:
            page.goto(url)
            ready(page)
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        until(page, "!document.getElementById('fault').hidden")
        with desk(folder, slides[:1], shipped, annotator="bob") as at, serving(at, urlsplit(url).port or 0):
            until(page, "document.getElementById('fault').textContent.includes('another labels folder or annotator')")
            assert "Labels not saved: 1." in page.locator("#fault").inner_text()
        with desk(folder, slides[:1], shipped) as at, serving(at, urlsplit(url).port or 0):
            press(page, "Enter")
            assert [one.answers for one in saved(folder)] == [{1: "present", 2: "absent"}]
            page.goto("about:blank")


def test_the_page_states_what_it_waits_for_if_each_answer_takes_five_seconds(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    saying = "document.getElementById('saved').textContent"
    with (
        failing_page(browser) as page,
        desk(folder, slides[:1], shipped, model=shipped) as at,
        serving(at, seconds=5) as url,
    ):
        page.goto(url, wait_until="commit")
        until(page, "document.getElementById('wait')")
        assert page.locator("#wait").inner_text() == "Opening the slides…"
        until(page, "document.getElementById('wait')?.textContent === 'Loading the picture…'", seconds=40)
        ready(page)
        assert page.locator("#wait").count() == 0
        made = []
        for count in (1, 2, 3):
            made.append(label_next(page, "1"))
            assert page.locator("#saved").inner_text() == f"Saving {count}…"
        page.keyboard.press("s")
        assert page.locator("#suggestion").inner_text() in ("Computing the suggestion…", "")  # "" for a blind patch
        until(page, f"{saying} === 'Saving 2…'")
        page.keyboard.press("z")
        until(page, f"{saying} === 'Undoing…'")
        assert [one.place.id for one in saved(folder)] == made
        page.keyboard.press("g")
        page.keyboard.press("1")
        assert page.locator("#grid-about").inner_text() == "Comparing patches…"
        until(page, f"{saying} === 'Undone'")
        assert [one.kind for one in saved(folder)] == ["label"] * 3 + ["undo"]
        page.goto("about:blank")


def test_the_patch_that_is_shown_stays_if_another_person_labels_it_meanwhile(
    browser: Browser, tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    folder = tmp_path / "l"
    with failing_page(browser) as page, desk(folder, slides[:1], shipped) as at, serving(at) as url:
        requests = held(page)
        page.goto(url)
        ready(page)
        label_next(page, "1")
        second = page.evaluate("() => wsiLabel.single.patch.id")
        place = at.session.place(second)
        assert place is not None
        with EventStore(folder / "labels.sqlite") as other:
            other.append(
                "bob", [Labeled(place=place, answers={1: "absent", 2: "absent"}, view="single", reason="random")]
            )
        while not requests:
            page.wait_for_timeout(20)
        requests[0].continue_()
        page.unroute("**/labels")
        ready(page)
        assert at.session.upcoming(1)[0].place.id != second
        assert shown(page) == second, "the next key would label a patch that nobody has looked at"
        press(page, "2", "Enter")
        assert [one.place.id for one in saved(folder)][-1] == second
        assert shown(page) != second
        page.goto("about:blank")  # the page asks ahead for patches, which would fail without a server
