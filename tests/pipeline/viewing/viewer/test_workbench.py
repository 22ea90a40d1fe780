"""What the server answers to the viewer's tools: values of the map, regions as GeoJSON, thumbnails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.results.names import THUMBNAIL
from pipeline.viewing.viewer.results import find_results
from tests.pipeline.fakes import labels_of, probs_of
from tests.pipeline.viewing.viewer.conftest import Site, serving


def test_the_values_of_a_pixel_are_those_that_the_map_stores(site: Site) -> None:
    folder = site.results[0].folder
    labels_HW, probs_KHW = labels_of(folder), probs_of(folder)
    height, width = labels_HW.shape
    rng = np.random.default_rng(5)
    places = [
        (0, 0),
        (width - 1, height - 1),
        *zip(rng.integers(0, width, 30), rng.integers(0, height, 30), strict=True),
    ]
    for x, y in places:
        answer = json.loads(site.get(f"values/{x}_{y}.json").body)
        assert answer == {"label": labels_HW[y, x], "probabilities": probs_KHW[:, y, x].tolist()}
    assert {labels_HW[y, x] for x, y in places} == {0, 1, 2}
    for beyond in (f"{width}_0", f"0_{height}", "-1_0", "9" * 40 + "_0"):
        assert site.get(f"values/{beyond}.json").status == 404


def test_a_selection_has_the_features_of_the_stored_geojson(site: Site) -> None:
    folder = site.results[0].folder
    stored = json.loads((folder / f"{folder.name}.geojson").read_text(encoding="utf-8"))["features"]
    assert len(stored) >= 2
    for numbers in ([0], [1], [0, len(stored) - 1]):
        answer = site.get(f"regions.geojson?numbers={','.join(map(str, numbers))}")
        assert answer.headers["content-type"] == "application/geo+json"
        assert json.loads(answer.body) == {"type": "FeatureCollection", "features": [stored[n] for n in numbers]}


@pytest.mark.parametrize("numbers", ["", "?numbers=", "?numbers=0,", "?numbers=-1", "?numbers=0;1", "?numbers=99999",
                                     "?numbers=%D9%A3"])  # fmt: skip
def test_other_numbers_are_not_found(site: Site, numbers: str) -> None:
    assert site.get(f"regions.geojson{numbers}").status == 404


def test_the_list_shows_the_thumbnail_of_each_result_that_has_one(results_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(next(results_folder.glob("block*")), tmp_path / name)
    (tmp_path / "b" / THUMBNAIL).unlink()
    with serving(find_results(tmp_path)) as site:
        with_, without = site.results
        answer = site.ask(f"/slides/{with_.id}/{with_.version}/thumbnail.jpg")
        assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
        assert answer.body == (tmp_path / "a" / THUMBNAIL).read_bytes()
        assert site.ask(f"/slides/{without.id}/{without.version}/thumbnail.jpg").status == 404
        index = site.ask("/").body.decode()
        assert [
            result.id for result in site.results if f'src="/slides/{result.id}/{result.version}/thumbnail.jpg"' in index
        ] == [with_.id]
