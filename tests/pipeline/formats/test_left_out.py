from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import shapely

from pipeline.formats.left_out import BLOCK_PX, write_left_out
from tests.pipeline.features import checked_features
from wsi.left_out import LeftOut, extents
from wsi.stain import DEFAULT_GLASS
from wsi.tissue import Tissue


def layer(tmp_path: Path, left_out_HW: np.ndarray) -> tuple[Tissue, list[dict]]:  # type: ignore[type-arg] # JSON
    tissue = Tissue(
        np.zeros(left_out_HW.shape, bool), left_out_HW, 16.0, 8.0, (), DEFAULT_GLASS, np.zeros(left_out_HW.shape, bool)
    )
    height, width = left_out_HW.shape
    write_left_out(tmp_path / "a.left-out.geojson", tissue, (16 * width, 16 * height), 0.5, "d" * 64)
    return tissue, checked_features((tmp_path / "a.left-out.geojson").read_text(encoding="utf-8"))


def test_each_piece_is_a_locked_annotation_of_a_class_that_qupath_ignores(tmp_path: Path) -> None:
    left_out_HW = np.zeros((60, 80), np.uint8)
    left_out_HW[10:20, 30:50] = LeftOut.PEN
    left_out_HW[40:44, 10:20] = LeftOut.FOLD
    left_out_HW[50:60, 70:80] = LeftOut.FOLD  # at the edge of the image
    tissue, features = layer(tmp_path, left_out_HW)
    found = [
        (
            feature["properties"]["classification"]["name"],
            shapely.box(*shapely.Polygon(feature["geometry"]["coordinates"][0]).bounds).bounds,
            feature["properties"]["measurements"]["Area mm^2"],
        )
        for feature in features
    ]
    assert all(feature["properties"]["isLocked"] for feature in features)
    assert sorted(found) == [
        ("fold*", (160.0, 640.0, 320.0, 704.0), pytest.approx(4 * 10 * 64e-6)),
        ("fold*", (1120.0, 800.0, 1280.0, 960.0), pytest.approx(100 * 64e-6)),
        ("pen*", (480.0, 160.0, 800.0, 320.0), pytest.approx(200 * 64e-6)),
    ]
    assert tissue.left_out[LeftOut.FOLD] == (140 * 64.0, 2)
    assert tissue.left_out[LeftOut.PEN] == (200 * 64.0, 1)


def test_pieces_across_blocks_are_one(tmp_path: Path) -> None:
    left_out_HW = np.zeros((BLOCK_PX + 40, 2 * BLOCK_PX + 30), np.uint8)
    left_out_HW[BLOCK_PX - 20 : BLOCK_PX + 20, BLOCK_PX - 10 : 2 * BLOCK_PX + 10] = LeftOut.DUST
    left_out_HW[10:20, BLOCK_PX : BLOCK_PX + 5] = LeftOut.PEN
    _, features = layer(tmp_path, left_out_HW)
    found = {
        f["properties"]["classification"]["name"]: shapely.Polygon(f["geometry"]["coordinates"][0]) for f in features
    }
    corners = [(16.0 * x, 16.0 * y) for x, y in ((BLOCK_PX - 10, BLOCK_PX - 20), (2 * BLOCK_PX + 10, BLOCK_PX + 20))]
    assert len(features) == 2
    assert found["dust*"].equals(shapely.box(*corners[0], *corners[1]))
    assert found["pen*"].equals(shapely.box(16.0 * BLOCK_PX, 160.0, 16.0 * (BLOCK_PX + 5), 320.0))


def test_areas_of_any_shape_are_those_of_the_record(tmp_path: Path) -> None:
    left_out_HW = np.zeros((60, 80), np.uint8)
    left_out_HW[5:40:3, 5:40:4] = LeftOut.DUST  # single pixels
    y, x = np.mgrid[:60, :80]
    left_out_HW[np.hypot(y - 45, x - 60) < 9.5] = LeftOut.PEN
    left_out_HW[np.abs(y - x + 40) < 2] = LeftOut.FOLD
    tissue, features = layer(tmp_path, left_out_HW)
    found: dict[str, float] = defaultdict(float)
    for feature in features:
        found[feature["properties"]["classification"]["name"]] += feature["properties"]["measurements"]["Area mm^2"]
    assert found == {
        f"{kind.title}*": pytest.approx(tissue.left_out[kind].area_um2 / 1e6)
        for kind in (LeftOut.DUST, LeftOut.PEN, LeftOut.FOLD)
    }


def test_a_slide_with_nothing_left_out_gives_an_empty_file(tmp_path: Path) -> None:
    assert layer(tmp_path, np.zeros((5, 5), np.uint8))[1] == []


def test_every_kind_has_a_name_and_a_color_of_its_own() -> None:
    assert len({kind.title for kind in LeftOut}) == len({kind.color for kind in LeftOut}) == len(LeftOut)
    empty = extents(np.zeros((3, 3), np.uint8), 8.0)
    assert {kind: tuple(extent) for kind, extent in empty.items()} == dict.fromkeys(LeftOut, (0.0, 0))


@pytest.mark.parametrize("seed", range(4))
def test_every_piece_of_a_layer_is_one_feature_and_no_area_is_covered_twice(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left_out_HW = (rng.random((40, 50)) < 0.6) * rng.integers(0, len(LeftOut) + 1, (40, 50)).astype(np.uint8)
    left_out_HW[10:20, 5:30] = LeftOut.PEN
    tissue, features = layer(tmp_path, left_out_HW)
    found = Counter(feature["properties"]["classification"]["name"] for feature in features)
    assert found == {f"{kind.title}*": extent.pieces for kind, extent in tissue.left_out.items() if extent.pieces}
    polygons = [shapely.Polygon(shell, holes) for shell, *holes in (one["geometry"]["coordinates"] for one in features)]
    assert sum(polygon.area for polygon in polygons) == pytest.approx(shapely.union_all(polygons).area)
