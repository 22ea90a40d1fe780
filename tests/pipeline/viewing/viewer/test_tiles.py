"""Tests of tiles and outlines: they have the values of the slide and of the stored map."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.formats.ome_zarr import MapSpec, MapStore, build_pyramid, create_store
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.viewer import outlines, slide_tiles
from pipeline.viewing.viewer.map_tiles import MapTiles
from pipeline.viewing.viewer.outlines import TOLERANCES_L0, outline_bytes
from pipeline.viewing.viewer.results import find_results
from pipeline.viewing.viewer.slide_tiles import SlideTiles, zoom_levels
from pipeline.web.cache import ByteCache
from tests.pipeline.fakes import CORNER, SMALL, color_predictor, labels_of, probs_of, stating_bounds
from tests.pipeline.viewing.viewer.conftest import Site, serving, textured
from tests.slides import GLASS, painted, reduce, write_slide
from wsi import readers
from wsi.box import Box
from wsi.slide import Pixels, open_slide

JPEG_ERROR = 3.0
"""Largest mean absolute difference after JPEG compression of the textured slides at the viewer's quality."""


def pixels(image: bytes | None) -> NDArray[np.int16]:
    assert image is not None
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(np.int16)


def whole_level(tiles: SlideTiles, level: int) -> NDArray[np.int16]:
    """Return a zoom level assembled from its tiles, as rgb_HWC."""
    rows = []
    for row in range(100):
        parts: list[NDArray[np.int16]] = []
        while (tile := tiles.jpeg(level, len(parts), row)) is not None:
            parts.append(pixels(tile))
        if not parts:
            break
        rows.append(np.concatenate(parts, axis=1))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "levels", [(1,), pytest.param((1, 4), marks=pytest.mark.full), pytest.param((1, 2, 8), marks=pytest.mark.full)]
)
def test_assembled_tiles_are_the_slide_averaged_by_area(tmp_path: Path, levels: tuple[int, ...]) -> None:
    rgb_HWC = textured((2560, 1664))
    with open_slide(write_slide(tmp_path / "a.svs", rgb_HWC, levels=levels), 1.0) as slide:
        tiles = SlideTiles(slide)
        assert (tiles.tile, tiles.levels) == (512, 4)
        for level in range(tiles.levels):
            expected_HWC = reduce(rgb_HWC, 2**level)
            found_HWC = whole_level(tiles, level)
            assert found_HWC.shape == expected_HWC.shape
            difference_HWC = np.abs(found_HWC - expected_HWC)
            assert difference_HWC.mean() < JPEG_ERROR
            # A shifted or swapped tile would differ much more.
            assert np.quantile(difference_HWC, 0.999) < 40


def test_the_last_tiles_end_at_the_edge_of_the_slide(tmp_path: Path) -> None:
    with open_slide(write_slide(tmp_path / "a.svs", textured((1281, 833))), 1.0) as slide:
        tiles = SlideTiles(slide)
        for place, size in (((0, 2, 1), (257, 321)), ((1, 1, 0), (129, 417)), ((2, 0, 0), (321, 209))):
            assert pixels(tiles.jpeg(*place)).shape[1::-1] == size
        for level, column, row in ((0, 3, 0), (0, 0, 2), (2, 1, 0), (3, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 0, -1)):
            assert tiles.jpeg(level, column, row) is None


def test_tiles_start_at_the_corner_of_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openslide", "tiffslide"):
        monkeypatch.setitem(readers.READERS, name, stating_bounds(readers.READERS[name]))
    rgb_HWC = textured((1500, 1000))
    with open_slide(write_slide(tmp_path / "a.svs", rgb_HWC), 1.0) as slide:
        tiles = SlideTiles(slide)
        inside_HWC = rgb_HWC[CORNER[1] : CORNER[1] + 832, CORNER[0] : CORNER[0] + 1280]
        for level in range(tiles.levels):
            assert np.abs(whole_level(tiles, level) - reduce(inside_HWC, 2**level)).mean() < JPEG_ERROR


def test_the_size_of_each_read_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_tiles, "PIECE_PX", 400)
    rgb_HWC = textured((2561, 1663))
    with open_slide(write_slide(tmp_path / "a.svs", rgb_HWC), 1.0) as slide:
        read, sizes = slide.read, []

        def noting(level: int, box_lv: Box) -> Pixels:
            sizes.append(max(box_lv.width, box_lv.height))
            return read(level, box_lv)

        monkeypatch.setattr(slide, "read", noting)
        found_HWC = whole_level(SlideTiles(slide), 3)
    assert len(sizes) == 7 * 5
    assert max(sizes) == 400
    assert found_HWC.shape == (208, 321, 3)
    assert np.abs(found_HWC[:207, :320] - reduce(rgb_HWC[:1656, :2560], 8)).mean() < JPEG_ERROR


def test_the_tile_size_is_a_multiple_of_the_slides_tile_size(sample_slide: Path) -> None:
    with open_slide(sample_slide, 0.499) as slide:  # its JPEG tiles are 240 px wide
        tiles = SlideTiles(slide)
        assert (slide.info.backend, tiles.tile, tiles.levels) == ("tiffslide", 480, 4)


@pytest.mark.parametrize(("size", "levels"), [((1, 1), 1), ((512, 512), 1), ((513, 1), 2), ((46000, 32914), 8)])
def test_coarsest_level_is_one_tile(size: tuple[int, int], levels: int) -> None:
    assert zoom_levels(size) == levels


@pytest.mark.full
def test_levels_with_a_fractional_downsample_are_not_shifted(shared_slides: Path) -> None:
    path = shared_slides / "TCGA-CR-7395-01A-01-TS1.svs"  # its second level is 2.0005 times smaller
    with open_slide(path, 0.25) as fast, open_slide(path, 0.25, "openslide") as slow:
        tiles = SlideTiles(fast)
        box = Box(0, 0, *slow.info.size_l0)
        whole_HWC = slow.read(0, box).rgb_HWC
        for level in (1, 2, 3):
            expected_HWC = reduce(whole_HWC, 2**level)
            found_HWC = whole_level(tiles, level)[: expected_HWC.shape[0], : expected_HWC.shape[1]]
            shifted_HWC = np.roll(expected_HWC, 1, axis=1).astype(np.int16)
            assert np.abs(found_HWC - expected_HWC).mean() < 0.6 * np.abs(found_HWC - shifted_HWC).mean()


def rgba(image: bytes | None) -> NDArray[np.uint8]:
    assert image is not None
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGBA"))


def test_map_tiles_have_the_stored_values_at_every_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spec = MapSpec("a", (700, 530), (TissueClass("x", (230, 159, 0)), TissueClass("y", (0, 158, 115))), 4.0)
    store = MapStore(tmp_path / "a.ome.zarr", spec)
    create_store(store.path, spec)
    probs_KHW = rng.integers(0, 256, (2, 1024, 1024), dtype=np.uint8)
    labels_HW = rng.integers(0, 3, (1024, 1024), dtype=np.uint8)
    store.write_block(Box(0, 0, 1024, 1024), probs_KHW, labels_HW)
    build_pyramid(store.path, spec)
    tiles = MapTiles(store.path, [one.color for one in spec.classes])
    assert (tiles.levels, tiles.size_out) == (2, (700, 530))
    assert np.array_equal(rgba(tiles.probability(1, 0, 1, 0))[..., 3], probs_KHW[1, :512, 512:700])
    for k, color in enumerate(one.color for one in spec.classes):
        tile_HWC = rgba(tiles.probability(k, 1, 0, 0))
        inside_HW = probs_KHW[k, :530, :700].astype(int)
        sums_HW = sum(inside_HW[y::2, x::2] for y in (0, 1) for x in (0, 1))
        assert np.array_equal(tile_HWC[..., 3], (sums_HW + 2) // 4)
        assert (tile_HWC[..., :3] == color).all()
    seen_HWC = rgba(tiles.labels(0b11, 0, 0, 0))
    for label, expected in ((0, 0), (1, (230, 159, 0, 255)), (2, (0, 158, 115, 255))):
        of_label = seen_HWC[labels_HW[:512, :512] == label]
        assert ((of_label if label else of_label[:, 3]) == expected).all()
    only_second_HW = rgba(tiles.labels(0b10, 0, 0, 0))[..., 3]
    assert np.array_equal(only_second_HW, np.where(labels_HW[:512, :512] == 2, 255, 0))


def test_map_tiles_beyond_classes_levels_and_edges_do_not_exist(results_folder: Path) -> None:
    result = find_results(results_folder)[0]
    tiles = MapTiles(result.store, [one.color for one in result.run.classes])
    assert tiles.probability(1, 0, 0, 0) is not None
    for place in ((tiles.levels, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 99, 0), (0, 0, -1)):
        assert tiles.probability(0, *place) is None
        assert tiles.labels(3, *place) is None
    assert tiles.probability(2, 0, 0, 0) is None
    assert tiles.probability(-1, 0, 0, 0) is None


def read_outlines(data: bytes) -> tuple[list[float], list[int], list[shapely.Polygon]]:
    """Return areas, labels and polygons, read by the documented byte layout."""
    count, rings, points, zero = np.frombuffer(data, "<u4", 4)
    assert zero == 0
    fields: list[NDArray[np.float64]] = []
    offset = 16
    for dtype, length in (("<f8", count), ("<u4", count), ("<u4", count + 1), ("<u4", rings + 1), ("<f4", 2 * points)):
        fields.append(np.frombuffer(data, dtype, int(length), offset))
        offset += fields[-1].nbytes
    assert offset == len(data)
    areas, labels, first_ring, first_point, xy = fields
    at = xy.reshape(-1, 2)
    ring = [at[int(a) : int(b)] for a, b in itertools.pairwise(first_point)]
    polygons = [shapely.Polygon(ring[int(a)], ring[int(a) + 1 : int(b)]) for a, b in itertools.pairwise(first_ring)]
    return areas.tolist(), [int(label) for label in labels], polygons


def test_outlines_are_the_polygons_of_the_result(results_folder: Path) -> None:
    result = find_results(results_folder)[0]
    table = pq.read_table(result.outlines)
    stored = shapely.from_wkb(table["geometry"].to_numpy())
    data = outline_bytes(result.outlines, 0)
    assert data is not None
    areas, labels, polygons = read_outlines(data)
    assert (areas, labels) == (table["area_mm2"].to_pylist(), table["label"].to_pylist())
    assert len(polygons) == result.run.polygons > 1
    assert any(len(polygon.interiors) for polygon in polygons)  # the purple region is a hole in the pink one
    assert [a.symmetric_difference(b).area < 1 for a, b in zip(polygons, stored, strict=True)] == [True] * len(stored)


@pytest.mark.parametrize("detail", range(1, len(TOLERANCES_L0)))
def test_coarser_outlines_keep_their_tolerance_and_every_polygon(results_folder: Path, detail: int) -> None:
    result = find_results(results_folder)[0]
    stored = shapely.from_wkb(pq.read_table(result.outlines)["geometry"].to_numpy())
    data = outline_bytes(result.outlines, detail)
    assert data is not None
    _, _, polygons = read_outlines(data)
    assert len(polygons) == len(stored)
    for simple, exact in zip(polygons, stored, strict=True):
        corners = shapely.points(shapely.get_coordinates(exact))
        far = shapely.distance(corners, simple.boundary).max()
        assert far <= TOLERANCES_L0[detail] + 0.1
    assert outline_bytes(result.outlines, len(TOLERANCES_L0)) is None


@pytest.mark.parametrize("detail", range(len(TOLERANCES_L0)))
def test_outlines_do_not_depend_on_the_batch_size(
    results_folder: Path, monkeypatch: pytest.MonkeyPatch, detail: int
) -> None:
    result = find_results(results_folder)[0]
    path = result.outlines
    expected = outline_bytes(path, detail)
    monkeypatch.setattr(outlines, "BATCH", 1)
    assert result.run.polygons > 1
    assert outline_bytes(path, detail) == expected


def test_the_server_returns_the_same_values(site: Site, results_folder: Path) -> None:
    folder = site.results[0].folder
    facts = site.get("facts.json")
    assert facts.status == 200
    answer = site.get("class/1/0/0_0.png")
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(rgba(answer.body)[..., 3], probs_of(folder)[1, :512, :512])
    labels_HW = labels_of(folder)[:512, :512]
    assert np.array_equal(rgba(site.get("labels/3/0/0_0.png").body)[..., 3] > 0, labels_HW > 0)
    slide_HWC = textured((1280, 832))[:512, 512:1024]
    answer = site.get("slide/0/1_0.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    assert np.abs(pixels(answer.body) - slide_HWC).mean() < JPEG_ERROR
    assert site.get("slide/0/1_0.jpg").body == answer.body  # from the cache
    for path in ("slide/0/9_0.jpg", "slide/9/0_0.jpg", "class/2/0/0_0.png", "labels/3/9/0_0.png", "outlines/9"):
        assert site.get(path).status == 404


@pytest.mark.full
def test_the_map_of_a_slide_with_bounds_starts_at_their_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openslide", "tiffslide"):
        monkeypatch.setitem(readers.READERS, name, stating_bounds(readers.READERS[name]))
    rgb_HWC = np.full((1000, 1500, 3), 244, np.uint8)
    rgb_HWC[CORNER[1] : CORNER[1] + 832, CORNER[0] : CORNER[0] + 1280] = textured((1280, 832))
    slide = write_slide(tmp_path / "a.svs", rgb_HWC, mpp=1.0)
    segment_slide(slide, tmp_path / "results", color_predictor(), SMALL)
    with serving(find_results(tmp_path / "results")) as site:
        # The pink region starts at (160, 96) in the frame of any bounds.
        tile_HWC = pixels(site.get("slide/0/0_0.jpg").body)
        label_HW = rgba(site.get("labels/3/0/0_0.png").body)[..., 3]
        areas, _, polygons = read_outlines(site.get("outlines/0").body)
    tissue_HW = tile_HWC[..., 1] < 200
    assert abs(int(np.argmax(tissue_HW[300])) - 160) <= 2
    assert abs(int(np.argmax(tissue_HW[:, 300])) - 96) <= 2
    assert abs(int(np.argmax(label_HW[75] > 0)) * 4 - 160) <= 8
    largest = polygons[int(np.argmax(areas))]
    assert np.allclose(largest.bounds, (160, 96, 1120, 736), atol=8)


def test_slide_without_tissue_is_shown_without_outlines(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", painted((640, 416)), mpp=1.0)
    segment_slide(slide, tmp_path / "results", color_predictor(), SMALL)
    with serving(find_results(tmp_path / "results")) as site:
        assert np.abs(pixels(site.get("slide/0/0_0.jpg").body) - GLASS).max() <= 2
        assert rgba(site.get("labels/3/0/0_0.png").body)[..., 3].max() == 0
        for detail in range(len(TOLERANCES_L0)):
            assert read_outlines(site.get(f"outlines/{detail}").body) == ([], [], [])


def test_the_cache_keeps_recently_used_entries_within_its_size() -> None:
    cache = ByteCache(10)
    for name in ("a", "b"):
        cache.put(name, name.encode() * 4)
    assert cache.peek("a") == b"aaaa"
    cache.put("c", b"cccc")
    assert [cache.peek(name) for name in "abc"] == [b"aaaa", None, b"cccc"]
    assert cache.held == 8
    cache.put("d", b"d" * 11)
    assert [cache.peek(name) for name in "acd"] == [None] * 3
    assert cache.held == 0
