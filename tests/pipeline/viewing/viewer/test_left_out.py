"""Tests of the layer of areas beside the tissue: its bytes, its legend, and where it lies on the slide."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.results.names import LEFT_OUT
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.viewer.outlines import left_out_bytes
from pipeline.viewing.viewer.results import find_results
from tests.browser import axe_findings, screenshot, until
from tests.pipeline.fakes import SMALL, color_predictor
from tests.pipeline.viewing.viewer.conftest import Site, serving, textured
from tests.pipeline.viewing.viewer.screen import color_at, place_on_screen, settle, show
from tests.slides import write_slide
from wsi.left_out import LeftOut

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page

LEFT, TOP, RIGHT, BOTTOM = 1144, 40, 1264, 520
"""The edges of the pen, in level-0 pixels of 1 µm: whole pixels of the tissue mask."""
PEN_MM2 = (RIGHT - LEFT) * (BOTTOM - TOP) / 1e6


@pytest.fixture(scope="module")
def penned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve the result of the viewer's slide with blue pen on the glass."""
    folder = tmp_path_factory.mktemp("left-out")
    rgb_HWC = textured((1280, 832))
    rgb_HWC[TOP:BOTTOM, LEFT:RIGHT] = (20, 60, 200)
    segment_slide(write_slide(folder / "a.svs", rgb_HWC, mpp=1.0, levels=(1, 4)), folder, color_predictor(), SMALL)
    with serving(find_results(folder)) as running:
        yield running


def test_the_areas_are_served_with_kind_and_size_only_if_there_are_any(site: Site, penned: Site) -> None:
    answer = penned.get("left-out/outlines/0")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    assert list(np.frombuffer(answer.body, "<u4", 2)) == [1, 1]  # one polygon with one ring
    assert np.frombuffer(answer.body, "<f8", 1, offset=16) == pytest.approx(PEN_MM2, rel=0.2)
    assert np.frombuffer(answer.body, "<u4", 1, offset=24) == [LeftOut.PEN]
    assert penned.get("left-out/outlines/9").status == 404
    assert site.get("left-out/outlines/0").status == 404
    kinds = json.loads(penned.get("facts.json").body)["left_out"]
    assert [kind["name"] for kind in kinds] == [kind.title for kind in LeftOut]
    assert json.loads(site.get("facts.json").body)["left_out"] is None


def test_a_coarse_detail_keeps_every_area(penned: Site) -> None:
    file = penned.results[0].folder / LEFT_OUT
    for detail in range(5):
        found = left_out_bytes(file, detail)
        assert found is not None
        assert np.frombuffer(found, "<u4", 1) == [1]


@pytest.mark.parametrize("text", ["", "[]", '{"features": [{}]}', '{"features": [{"properties": {"classification": '
                                  '{"name": "glue*"}}}]}', "[" * 100_000])  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / LEFT_OUT).write_text(text)
    with pytest.raises(OSError, match=f"{LEFT_OUT}: cannot be read"):
        left_out_bytes(tmp_path / LEFT_OUT, 0)


def test_the_layer_is_off_at_first_and_a_key_draws_it_in_the_colors_of_the_legend(
    page: Page, penned: Site, tmp_path: Path
) -> None:
    show(page, penned, "#x=1100&y=200&zoom=1.5&map=0&outlines=0")
    edge, inside, pen = (LEFT, (TOP + BOTTOM) / 2), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), LeftOut.PEN.color
    before = color_at(page, *edge)
    assert not page.get_by_label("Areas beside the tissue", exact=False).first.is_checked()
    legend = page.locator(".facts .swatch")
    assert legend.evaluate_all(
        "found => found.map(one => [one.dataset.kind, getComputedStyle(one).backgroundColor])"
    ) == [["pen", "rgb({}, {}, {})".format(*pen)]]
    page.keyboard.press("x")
    until(page, "window.wsiView && wsiView.leftOut.front?.final")
    settle(page)
    assert np.abs(color_at(page, *edge) - before).max() > 15
    assert "left-out=1" in page.url
    page.mouse.move(*place_on_screen(page, *inside))
    until(page, "!document.getElementById('tip').hidden")
    assert page.locator("#tip").inner_text().strip().startswith("pen · 0.0")
    assert axe_findings(page) == []
    screenshot(page, "viewer-left-out", tmp_path)
    page.mouse.move(0, 0)
    page.keyboard.press("x")
    settle(page)
    assert np.abs(color_at(page, *edge) - before).max() < 3


@pytest.mark.full
def test_the_key_i_announces_the_kind_at_the_center(page: Page, penned: Site) -> None:
    x, y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    show(page, penned, f"#x={x}&y={y}&zoom=1.5&left-out=1")
    until(page, "window.wsiView && wsiView.leftOut.front?.final")
    page.keyboard.press("i")
    until(page, "document.getElementById('announcement').textContent")
    assert page.locator("#announcement").inner_text().startswith("no class; pen, 0.0")


def test_an_older_result_lists_the_areas_and_has_no_layer(penned: Site, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(penned.results[0].folder, folder)
    (folder / LEFT_OUT).unlink()
    (result,) = find_results(folder)
    with serving((result,)) as site:
        text = site.get("").body.decode()
    assert "<dt>Pen</dt><dd>0.0" in text
    assert "left-out-on" not in text
