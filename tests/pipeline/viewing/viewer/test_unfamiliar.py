"""Tests of what the viewer shows of a slide that does not look like the training data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.formats.familiarity import OPACITY, UNFAMILIAR
from pipeline.viewing.viewer.results import find_results
from tests.browser import axe_findings, screenshot
from tests.pipeline.unfamiliar import WARNING, make_unfamiliar
from tests.pipeline.viewing.viewer.conftest import Site, serving
from tests.pipeline.viewing.viewer.screen import color_at, mixed, show

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

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
