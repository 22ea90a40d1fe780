"""Tests of the exported pictures and tiles: they have the map's values, in QuPath's frame."""

from __future__ import annotations

import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.ome_zarr import MapSpec, MapStore, build_pyramid, create_store
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.qupath.maps import ProbabilityMap, write_overlays, write_tiles
from pipeline.viewing.qupath.project import write_project
from tests.pipeline.fakes import CORNER, REGIONS, SMALL, color_predictor, probs_of, run_of, stating_bounds
from tests.pipeline.features import checked_features
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.box import Box
from wsi.readers import READERS


def map_of(folder: Path) -> ProbabilityMap:
    run = run_of(folder)
    classes = (TissueClass("pink", PINK), TissueClass("purple", PURPLE))
    size_out = (run["plan"]["map_size"][0], run["plan"]["map_size"][1])
    size_l0 = (4 * size_out[0], 4 * size_out[1])
    return ProbabilityMap(folder / f"{folder.name}.ome.zarr", classes, size_out, 4.0, size_l0, "digest")


def wide_map(path: Path, size_out: tuple[int, int]) -> ProbabilityMap:
    spec = MapSpec("wide", size_out, (TissueClass("a", (1, 2, 3)),), 4.0)
    create_store(path, spec)
    store = MapStore(path, spec)
    rng = np.random.default_rng(5)
    for y in range(0, size_out[1], 512):
        for x in range(0, size_out[0], 512):
            box = Box(x, y, 512, 512)
            values = rng.integers(1, 255, (1, 512, 512), dtype=np.uint8)
            store.write_block(box, values, np.ones((512, 512), np.uint8))
    build_pyramid(path, spec)
    size_l0 = (4 * size_out[0], 4 * size_out[1])
    return ProbabilityMap(path, spec.classes, size_out, 4.0, size_l0, "digest")


@pytest.mark.full
def test_tiles_have_the_mean_of_the_map(root: Path, tmp_path: Path) -> None:
    folder = root / "results" / "b"
    path = tmp_path / "t.geojson"
    count = write_tiles(path, map_of(folder), tile_out=20)
    features = checked_features(path.read_text(encoding="utf-8"))
    probs_KHW = probs_of(folder)[:, :208, :320].astype(float)
    expected = {}
    for y in range(0, 208, 20):
        for x in range(0, 320, 20):
            tile_KHW = probs_KHW[:, y : min(y + 20, 208), x : min(x + 20, 320)]
            if tile_KHW.max() > 0:
                corner = (4.0 * x, 4.0 * y, 4.0 * min(x + 20, 320), 4.0 * min(y + 20, 208))
                expected[corner] = [tile_KHW[k].sum() / tile_KHW[k].size / 255 for k in range(2)]
    found = {}
    for feature in features:
        (ring,) = feature["geometry"]["coordinates"]
        assert feature["properties"]["objectType"] == "tile"
        assert list(feature["properties"]["measurements"]) == ["Probability pink", "Probability purple"]
        found[*ring[0], *ring[2]] = list(feature["properties"]["measurements"].values())
    assert found.keys() == expected.keys()
    assert 20 < len(expected) < 16 * 11
    for corner, means in expected.items():
        assert found[corner] == pytest.approx(means, abs=6e-6)
    assert len({feature["id"] for feature in features}) == count == len(features)
    assert all(uuid.UUID(feature["id"]).version == 5 for feature in features)
    again = tmp_path / "again.geojson"
    write_tiles(again, map_of(folder), tile_out=20)
    assert again.read_bytes() == path.read_bytes()


def test_the_last_tiles_end_at_the_edge_of_the_map_without_its_padding(tmp_path: Path) -> None:
    probability = wide_map(tmp_path / "wide.ome.zarr", (701, 601))
    assert probability.probs(0).shape == (1, 602, 702)
    write_tiles(tmp_path / "t.geojson", probability, tile_out=256)
    *_, last = checked_features((tmp_path / "t.geojson").read_text(encoding="utf-8"))
    (ring,) = last["geometry"]["coordinates"]
    assert (ring[0], ring[2]) == ([512 * 4.0, 512 * 4.0], [701 * 4.0, 601 * 4.0])
    mean = np.asarray(probability.probs(0)[0, 512:601, 512:701]).astype(float).sum() / (89 * 189) / 255
    assert last["properties"]["measurements"] == {"Probability a": pytest.approx(mean, abs=6e-6)}


def test_no_tile_passes_the_slide(tmp_path: Path) -> None:
    probability = replace(wide_map(tmp_path / "wide.ome.zarr", (701, 601)), size_l0=(2803, 2401))
    write_tiles(tmp_path / "t.geojson", probability, tile_out=256)
    *_, last = checked_features((tmp_path / "t.geojson").read_text(encoding="utf-8"))
    (ring,) = last["geometry"]["coordinates"]
    assert (ring[0], ring[2]) == ([512 * 4.0, 512 * 4.0], [2803, 2401])


def test_tiles_and_pictures_are_in_qupaths_frame_on_a_slide_with_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = CORNER
    shapes = [((left + x, top + y, w, h), color) for (left, top, w, h), color in REGIONS]
    slide = write_slide(tmp_path / "mirax.svs", painted((1280 + 128, 832 + 64), *shapes), mpp=1.0)
    monkeypatch.setitem(READERS, "openslide", stating_bounds(READERS["openslide"]))
    result = segment_slide(slide, tmp_path / "results", color_predictor(), SMALL)
    assert result.folder is not None
    assert run_of(result.folder)["slide"]["qupath_offset"] == list(CORNER)
    project = write_project(tmp_path / "results")
    path = tmp_path / "t.geojson"
    write_tiles(path, map_of(result.folder), tile_out=8)
    left, top, width, height = REGIONS[1][0]
    inside: list[float] = []
    outside: list[float] = []
    for feature in checked_features(path.read_text(encoding="utf-8")):
        (ring,) = feature["geometry"]["coordinates"]
        (x0, y0), (x1, y1) = ring[0], ring[2]
        within = left <= x0 and x1 <= left + width and top <= y0 and y1 <= top + height
        apart = x1 <= left or x0 >= left + width or y1 <= top or y0 >= top + height
        if within or apart:
            (inside if within else outside).append(feature["properties"]["measurements"]["Probability purple"])
    assert len(inside) == (320 // 32) * (256 // 32)
    assert min(inside) > 0.95
    assert max(outside) < 0.05
    picture = np.asarray(Image.open(project.parent / "maps" / "mirax" / "1.png").convert("RGBA"))
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert (columns.min() * 4, rows.min() * 4) == (left, top)
    assert ((columns.max() + 1) * 4, (rows.max() + 1) * 4) == (left + width, top + height)


def test_a_picture_has_the_color_of_the_class_and_its_probability_as_opacity(root: Path, tmp_path: Path) -> None:
    size_l0 = write_overlays(tmp_path / "maps", map_of(root / "results" / "b"))
    probs_KHW = probs_of(root / "results" / "b")
    assert size_l0 == (probs_KHW.shape[2] * 4, probs_KHW.shape[1] * 4)
    for k, color in enumerate((PINK, PURPLE)):
        rgba_HWC = np.asarray(Image.open(tmp_path / "maps" / f"{k}.png").convert("RGBA"))
        np.testing.assert_array_equal(rgba_HWC[..., 3], probs_KHW[k])
        assert np.unique(rgba_HWC[..., :3].reshape(-1, 3), axis=0).tolist() == [list(color)]


def test_the_picture_of_a_large_map_comes_from_a_coarser_level(tmp_path: Path) -> None:
    probability = wide_map(tmp_path / "wide.ome.zarr", (4200, 600))
    # The stored width and height are padded to halve exactly down to the last of five levels.
    assert write_overlays(tmp_path / "maps", probability) == (4208 * 4, 608 * 4)
    with Image.open(tmp_path / "maps" / "0.png") as picture:
        assert picture.size == (4208 // 4, 608 // 4)


@pytest.mark.full
def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path: Path) -> None:
    peaks = []
    for size in (512, 1024):
        probability = wide_map(tmp_path / f"{size}.ome.zarr", (size, size))
        write_tiles(tmp_path / "warm.geojson", probability, tile_out=256)
        tracemalloc.start()
        count = write_tiles(tmp_path / "t.geojson", probability, tile_out=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == (size // 16) ** 2
    assert peaks[1] < peaks[0] + 300_000
    assert (tmp_path / "t.geojson").stat().st_size > 1_000_000
