"""Tests of what the viewer shows of a slide that does not look like the training data."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.formats.familiarity import OPACITY, UNFAMILIAR
from pipeline.results.record import read_run, write_run
from pipeline.viewing.viewer.results import find_results
from tests.browser import audited_page, axe_findings, failing_page, screenshot, until
from tests.cases import full
from tests.pipeline.unfamiliar import WARNING, make_unfamiliar
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.screen import color_at, mixed, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Browser, Page

LEFT, RIGHT = (100, 50), (1100, 50)
"""Places on the glass, in level-0 pixels. Only the right one is unfamiliar."""


@pytest.fixture(scope="module")
def unfamiliar(results_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("unfamiliar") / "results"
    shutil.copytree(results_folder, folder)
    for result in find_results(folder):
        make_unfamiliar(result.folder)
    with serving(find_results(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def listed(results_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve two unfamiliar slides and a familiar one of the same model, and one of a model with markup in its texts."""
    folder = tmp_path_factory.mktemp("listed")
    for name in ("far", "far 2", "near", "other"):
        shutil.copytree(next(results_folder.glob("block*")), folder / name)
    for name in ("far", "far 2", "other"):
        make_unfamiliar(folder / name)
    _change(folder / "near", scope="paint", limits="For tests.", warnings=("another warning",))
    texts = {"model": "<i>other</i>", "scope": "<i>ink & oil</i>", "limits": "<i>Not for you.</i>"}
    _change(folder / "other", **texts, warnings=("<i>unlike</i>",))
    with serving(find_results(folder)) as running:
        yield running


def _change(folder: Path, **facts: object) -> None:
    run = read_run(folder)
    assert run is not None
    write_run(folder, run.model_copy(update=facts))


def _list_page(site: Site) -> str:
    answer = site.ask("/")
    assert answer.status == 200
    return answer.body.decode()


def _rows(page: str) -> dict[str, str]:
    """Return the text of each slide's row in the list, by the slide's name."""
    rows = [_text(row) for row in re.findall(r"<tr>(.*?)</tr>", page.partition("<tbody>")[2], re.DOTALL)]
    return {row.partition(" model ")[0]: row for row in rows}


def _text(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def test_the_list_has_the_warning_at_each_unfamiliar_slide_and_only_there(listed: Site) -> None:
    rows = _rows(_list_page(listed))
    assert list(rows) == ["far", "far 2", "near", "other"]
    for name in ("far", "far 2"):
        assert rows[name].endswith(f" mm² Warning: {WARNING}")
    assert "arning" not in rows["near"]


def test_the_list_has_the_scope_and_the_limits_of_each_model_once(listed: Site) -> None:
    page = _list_page(listed)
    model = listed.results[0].run.model
    assert _text(page.partition("</table>")[2]) == (
        f"What the models are for <i>other</i>: <i>ink & oil</i> <i>Not for you.</i> {model}: paint For tests."
    )
    rows = _rows(page)
    assert all(rows[result.name].startswith(f"{result.name} model {result.run.model} ") for result in listed.results)


def test_the_list_escapes_the_texts_of_the_models(listed: Site) -> None:
    page = _list_page(listed)
    assert "<i>" not in page
    assert "&lt;i&gt;ink &amp; oil&lt;/i&gt;" in page
    assert "Warning: &lt;i&gt;unlike&lt;/i&gt;" in page


def test_the_list_of_older_results_without_limits_has_no_block_of_models(results_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(next(results_folder.glob("block*")), tmp_path / name)
        _change(tmp_path / name, scope="", limits="")
    with serving(find_results(tmp_path)) as site:
        page = _list_page(site)
    assert "2 slides" in page
    assert "What the models are for" not in page
    assert "Warning" not in page


@pytest.mark.parametrize("scheme", ["light", full("dark")])
@pytest.mark.parametrize("width", [full(1280), 390])
def test_the_list_is_accessible(browser: Browser, listed: Site, tmp_path: Path, scheme: str, width: int) -> None:
    with audited_page(browser, scheme, width=width, height=800) as page:
        page.goto(listed.url)
        assert page.get_by_role("row", name="far 2").get_by_text(f"Warning: {WARNING}").is_visible()
        assert page.get_by_role("region", name="What the models are for").get_by_text("For tests.").is_visible()
        assert axe_findings(page) == []
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        screenshot(page, f"viewer-list-{scheme}-{width}", tmp_path)


def test_the_picture_is_served_only_if_the_result_has_one(site: Site, unfamiliar: Site) -> None:
    answer = unfamiliar.get("familiarity.png")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert answer.body == (unfamiliar.results[0].folder / "familiarity.png").read_bytes()
    assert site.get("familiarity.png").status == 404


def test_scope_limits_and_warning_stand_beside_the_slide(page: Page, unfamiliar: Site, tmp_path: Path) -> None:
    show(page, unfamiliar)
    assert page.locator("#notes [role=alert]").inner_text() == f"Warning: {WARNING}"
    panel = " ".join(page.locator("#panel").inner_text().split())
    assert "For paint" in panel
    assert "Unlike the training data 60 %" in panel
    assert "For tests." in panel
    assert page.locator("#warnings li").all_inner_texts() == ["another warning"]
    assert axe_findings(page) == []
    screenshot(page, "viewer-unfamiliar", tmp_path)


@pytest.mark.full
def test_a_damaged_picture_of_the_unfamiliar_tissue_has_a_note(
    browser: Browser, unfamiliar: Site, tmp_path: Path
) -> None:
    shutil.copytree(unfamiliar.results[0].folder, tmp_path / "a")
    (tmp_path / "a" / "familiarity.png").write_bytes(b"damaged")
    with serving(find_results(tmp_path)) as damaged, failing_page(browser) as page:
        show(page, damaged)
        notes = page.locator("#notes p")
        count = notes.count()
        page.keyboard.press("u")
        until(page, f"document.querySelectorAll('#notes p').length > {count}")
        page.keyboard.press("u")
        page.keyboard.press("u")
        page.wait_for_timeout(300)
        assert notes.all_inner_texts()[count:] == [
            "The tissue unlike the training data cannot be shown. Check familiarity.png in the folder of the result, "
            "then reload the page."
        ]
        page.goto("about:blank")


@pytest.mark.full
def test_the_layer_lies_over_the_unfamiliar_part(page: Page, unfamiliar: Site) -> None:
    bare = "#x=640&y=416&zoom=0.7&map=0&outlines=0"
    show(page, unfamiliar, bare)
    before = {place: color_at(page, *place) for place in (LEFT, RIGHT)}
    show(page, unfamiliar, f"{bare}&unfamiliar=1")
    assert page.get_by_label("Unlike the training data", exact=False).first.is_checked()
    expected = mixed(before[RIGHT], UNFAMILIAR, OPACITY / 255)
    assert np.abs(color_at(page, *RIGHT) - expected).max() < 4
    assert np.abs(color_at(page, *LEFT) - before[LEFT]).max() < 2
    page.keyboard.press("u")
    page.wait_for_timeout(300)
    assert np.abs(color_at(page, *RIGHT) - before[RIGHT]).max() < 2


@pytest.mark.full
def test_a_result_without_the_picture_has_no_such_layer(page: Page, site: Site) -> None:
    show(page, site)
    assert page.locator("#unfamiliar-on").count() == 0
    page.keyboard.press("u")
    page.keyboard.press("h")
    page.keyboard.press("h")
    assert page.locator("#map-on").is_checked()
