"""Label maps to polygons and back, in one block or in many."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.formats.polygons import Region, block_regions, join_regions
from tests.pipeline.formats.label_maps import Labels, geometries, label_maps, rasterized, smooth_map


@st.composite
def cut_maps(draw: st.DrawFn) -> tuple[Labels, list[int], list[int]]:
    labels_HW = draw(label_maps())
    height, width = labels_HW.shape
    rows = sorted(draw(st.sets(st.integers(1, height), max_size=3)) | {0, height})
    columns = sorted(draw(st.sets(st.integers(1, width), max_size=3)) | {0, width})
    return labels_HW, rows, columns


Patches = tuple[Labels, list[int], float]


@st.composite
def maps_of_patches(draw: st.DrawFn) -> Patches:
    """Return a square map with regions of many sizes in a frame of class 1, where to cut it, and a smallest area."""
    sigma, seed = draw(st.sampled_from([0.7, 1.0, 2.0])), draw(st.integers(0, 2**32 - 1))
    labels_HW = np.pad(smooth_map(44, sigma, seed=seed), 2, constant_values=1)
    side = draw(st.sampled_from([16, 24]))
    return labels_HW, list(range(0, 48 + side, side)), draw(st.sampled_from([5.0, 20.0, 60.0]))


def of_blocks(
    labels_HW: Labels, rows: Sequence[int], columns: Sequence[int], min_area_px: float = 0, tolerance_px: float = 0
) -> list[Region]:
    return [
        region
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
        for region in block_regions(labels_HW[top:bottom, left:right], (left, top), min_area_px, tolerance_px)
    ]


def joined(regions: Sequence[Region], min_area_px: float = 0) -> list[tuple[int, str]]:
    return as_rows(list(join_regions(regions, min_area_px)))


def as_rows(regions: Sequence[Region]) -> list[tuple[int, str]]:
    return sorted((region.label, region.geometry_out.wkt) for region in regions)


@given(label_maps())
def test_rasterized_polygons_equal_the_labels(labels_HW: Labels) -> None:
    regions = block_regions(labels_HW, (7, 3), 0, 0)
    assert shapely.is_valid(geometries(regions)).all()
    np.testing.assert_array_equal(rasterized(regions, labels_HW.shape, (7, 3)), labels_HW)
    for label in range(1, 4):
        area = sum(region.geometry_out.area for region in regions if region.label == label)
        assert area == np.count_nonzero(labels_HW == label)


@given(label_maps())
def test_each_polygon_is_one_4_connected_region(labels_HW: Labels) -> None:
    regions = block_regions(labels_HW, (0, 0), 0, 0)
    for label in range(1, 4):
        assert sum(region.label == label for region in regions) == ndimage.label(labels_HW == label)[1]


@given(cut_maps())
def test_joined_blocks_equal_the_whole_map_as_one_block(cut: tuple[Labels, list[int], list[int]]) -> None:
    labels_HW, rows, columns = cut
    whole = [region for region in block_regions(labels_HW, (0, 0), 0, 0) if region.label > 0]
    assert joined(of_blocks(labels_HW, rows, columns)) == as_rows(whole)


@given(cut_maps(), st.floats(0, 9), st.floats(0, 3), st.integers(0, 2**32))
def test_join_does_not_depend_on_the_order(
    cut: tuple[Labels, list[int], list[int]], min_area_px: float, tolerance_px: float, seed: int
) -> None:
    regions = of_blocks(*cut, min_area_px, tolerance_px)
    shuffled = random.Random(seed).sample(regions, len(regions))
    assert joined(shuffled, min_area_px) == joined(regions, min_area_px)


@given(cut_maps(), st.floats(0.5, 4))
def test_simplified_blocks_have_no_overlap_and_no_gap(
    cut: tuple[Labels, list[int], list[int]], tolerance_px: float
) -> None:
    labels_HW, rows, columns = cut
    # Labels plus one: no pixel is background, so the join returns every region.
    regions = of_blocks(labels_HW + np.uint8(1), rows, columns, 0, tolerance_px)
    united = list(join_regions(regions, 0))
    for polygons in (geometries(regions), geometries(united)):
        assert shapely.is_valid(polygons).all()
        assert shapely.area(polygons).sum() == labels_HW.size
        assert shapely.union_all(polygons).equals(shapely.box(0, 0, labels_HW.shape[1], labels_HW.shape[0]))


@given(cut_maps(), st.floats(1, 12))
def test_merging_small_regions_keeps_a_partition(cut: tuple[Labels, list[int], list[int]], min_area_px: float) -> None:
    labels_HW, rows, columns = cut
    regions = of_blocks(labels_HW + np.uint8(1), rows, columns, min_area_px, 0)
    assert sum(region.geometry_out.area for region in regions) == labels_HW.size
    assert all(region.open or region.geometry_out.area >= min_area_px for region in regions)
    united = list(join_regions(regions, min_area_px))
    assert shapely.is_valid(geometries(united)).all()
    assert all(region.geometry_out.area >= min_area_px for region in united)
    assert shapely.union_all(geometries(united)).area == sum(region.geometry_out.area for region in united)


@settings(max_examples=20)
@given(maps_of_patches(), st.sampled_from([0, 1.5]))
def test_tissue_without_background_has_no_hole_in_one_block_or_in_many(drawn: Patches, tolerance_px: float) -> None:
    labels_HW, cuts, min_area_px = drawn
    labels_HW = labels_HW + np.uint8(1)
    for lines in ([0, len(labels_HW)], cuts):
        united = geometries(
            list(join_regions(of_blocks(labels_HW, lines, lines, min_area_px, tolerance_px), min_area_px))
        )
        assert shapely.is_valid(united).all()
        assert shapely.area(united).sum() == labels_HW.size
        assert shapely.union_all(united).equals(shapely.box(0, 0, *labels_HW.shape))


@settings(max_examples=20)
@given(maps_of_patches())
def test_every_hole_in_the_tissue_has_background_in_one_block_and_in_many(drawn: Patches) -> None:
    labels_HW, cuts, min_area_px = drawn
    x_W = np.arange(len(labels_HW)) + 0.5
    for lines in ([0, len(labels_HW)], cuts):
        united = geometries(list(join_regions(of_blocks(labels_HW, lines, lines, min_area_px), min_area_px)))
        covered_HW = shapely.contains_xy(shapely.union_all(united), x_W[None, :], x_W[:, None])
        holes_HW, count = ndimage.label(~covered_HW)
        assert set(holes_HW[labels_HW == 0]) >= set(range(1, count + 1))


def test_simplifying_a_smooth_map_in_blocks_leaves_no_sliver() -> None:
    labels_HW = smooth_map(256, 6) + np.uint8(1)
    regions = of_blocks(labels_HW, [0, 100, 256], [0, 64, 200, 256], 16, 1.5)
    united = list(join_regions(regions, 16))
    assert shapely.is_valid(geometries(united)).all()
    whole = shapely.union_all(geometries(united))
    assert whole.equals(shapely.box(0, 0, 256, 256))
    assert len(whole.exterior.coords) >= 5
    assert not whole.interiors
    assert shapely.area(geometries(united)).sum() == 256 * 256
    exact = list(join_regions(of_blocks(labels_HW, [0, 256], [0, 256]), 0))
    assert shapely.get_num_coordinates(geometries(united)).sum() < shapely.get_num_coordinates(geometries(exact)).sum()


def test_pinch_point_keeps_the_hole_and_the_diagonal_apart() -> None:
    labels_HW = np.array(
        [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]], np.uint8
    )
    regions = [region for region in block_regions(labels_HW, (0, 0), 0, 0) if region.label]
    assert [region.geometry_out.area for region in regions] == [7, 1]
    assert [len(region.geometry_out.interiors) for region in regions] == [1, 0]
    assert [region.open for region in regions] == [False, True]
    assert shapely.is_valid(geometries(regions)).all()


def test_islands_inside_holes_are_regions_of_their_own() -> None:
    labels_HW = np.zeros((11, 11), np.uint8)
    for inset, label in ((1, 1), (2, 0), (3, 2), (4, 0), (5, 1)):
        labels_HW[inset : 11 - inset, inset : 11 - inset] = label
    regions = [region for region in block_regions(labels_HW, (0, 0), 0, 0) if region.label]
    assert sorted((region.label, region.geometry_out.area) for region in regions) == [(1, 1), (1, 32), (2, 16)]
    assert sorted(len(region.geometry_out.interiors) for region in regions) == [0, 1, 1]


def test_a_checkerboard_has_one_polygon_per_pixel() -> None:
    labels_HW = (np.indices((8, 8)).sum(axis=0) % 2 + 1).astype(np.uint8)
    rows = joined(of_blocks(labels_HW, [0, 3, 8], [0, 4, 8]))
    assert len(rows) == 64
    assert {shapely.from_wkt(wkt).area for _, wkt in rows} == {1.0}


def test_region_over_all_blocks_becomes_one_rectangle() -> None:
    labels_HW = np.ones((12, 20), np.uint8)
    (region,) = join_regions(of_blocks(labels_HW, [0, 5, 12], [0, 4, 9, 20]), 10)
    assert region.geometry_out.equals_exact(shapely.normalize(shapely.box(0, 0, 20, 12)))
    assert len(region.geometry_out.exterior.coords) == 5
    assert not region.open


def test_the_join_never_returns_background() -> None:
    assert list(join_regions(of_blocks(np.zeros((8, 8), np.uint8), [0, 4, 8], [0, 8]), 4)) == []
    assert list(join_regions([], 4)) == []


def test_a_small_closed_region_joins_the_neighbor_with_the_longest_border() -> None:
    labels_HW = np.full((8, 8), 1, np.uint8)
    labels_HW[:, 5:] = 2
    labels_HW[3:5, 4] = 3  # four edges to class 1, two to class 2
    labels_HW[6, 6] = 0
    regions = block_regions(labels_HW, (0, 0), 3, 0)
    assert sorted((region.label, region.geometry_out.area) for region in regions) == [(1, 40), (2, 24)]


def test_a_tie_is_resolved_to_the_smallest_label() -> None:
    labels_HW = np.array([[2, 2, 1], [2, 3, 1], [2, 1, 1]], np.uint8)
    regions = block_regions(labels_HW, (0, 0), 2, 0)
    assert sorted((region.label, region.geometry_out.area) for region in regions) == [(1, 5), (2, 4)]


def test_small_regions_at_a_block_border_wait_for_the_join() -> None:
    labels_HW = np.ones((6, 12), np.uint8)
    labels_HW[2:4, 5:7] = 2  # four pixels, two in each block
    labels_HW[2:4, 0] = 3  # two pixels at the map's edge
    regions = of_blocks(labels_HW, [0, 6], [0, 6, 12], 4, 0)
    assert {region.label for region in regions} == {1, 2, 3}
    assert [(r.label, r.geometry_out.area) for r in join_regions(regions, 4)] == [(1, 68), (2, 4)]
    assert [(r.label, r.geometry_out.area) for r in join_regions(regions, 5)] == [(1, 72)]


def test_a_small_region_over_a_border_joins_a_region_inside_a_block() -> None:
    labels_HW = np.ones((64, 128), np.uint8)
    labels_HW[20:40, 44:62] = 2
    labels_HW[28:32, 50:66] = 3
    whole = block_regions(labels_HW, (0, 0), 125, 0)
    regions = of_blocks(labels_HW, [0, 64], [0, 64, 128], 125, 0)
    assert [region.label for region in regions if region.may_grow] == [2]
    assert joined(regions, 125) == joined(whole, 125)
    assert sorted((r.label, r.geometry_out.area) for r in join_regions(regions, 125)) == [(1, 7816), (2, 376)]


def test_a_small_ring_at_a_border_joins_the_region_in_its_hole() -> None:
    labels_HW = np.ones((20, 40), np.uint8)
    labels_HW[10:] = 2
    labels_HW[5:15, 10:20] = 3
    labels_HW[6:14, 11:19] = 4  # the ring has 32 edges to it and 20 to each half of the rest
    regions = of_blocks(labels_HW, [0, 20], [0, 20, 40], 40, 0)
    found = [(r.label, r.geometry_out.area, len(r.geometry_out.interiors)) for r in join_regions(regions, 40)]
    assert found == [(1, 350, 0), (2, 350, 0), (4, 100, 0)]


def test_small_background_hole_over_a_border_is_filled() -> None:
    labels_HW = np.ones((6, 12), np.uint8)
    labels_HW[3, 5:7] = 0
    regions = of_blocks(labels_HW, [0, 6], [0, 6, 12], 3, 0)
    assert joined(regions, 3) == joined(of_blocks(np.ones((6, 12), np.uint8), [0, 6], [0, 12]))
    (region,) = join_regions(regions, 2)
    assert len(region.geometry_out.interiors) == 1


def test_small_region_whose_longest_border_is_outside_becomes_background() -> None:
    labels_HW = np.zeros((4, 4), np.uint8)
    labels_HW[0, 0] = 1
    assert list(join_regions(block_regions(labels_HW, (0, 0), 0, 0), 2)) == []


def test_background_sliver_at_the_edge_of_the_map_is_not_filled() -> None:
    labels_HW = np.ones((4, 4), np.uint8)
    labels_HW[:, 0] = 0
    assert [r.geometry_out.area for r in join_regions(block_regions(labels_HW, (0, 0), 9, 0), 9)] == [12]


@pytest.mark.parametrize("labels_HW", [np.zeros((0, 4), np.uint8), np.zeros((4, 4), np.int64), np.zeros(4, np.uint8)])
def test_other_arrays_are_refused(labels_HW: Labels) -> None:
    with pytest.raises(ValueError, match="non-empty 2-D uint8"):
        block_regions(labels_HW, (0, 0), 0, 0)


def test_coordinates_off_the_grid_are_refused_by_the_join() -> None:
    with pytest.raises(ValueError, match="1/64 pixel"):
        list(join_regions([Region(1, shapely.box(0, 0, 1.51, 2), True)], 0))


def test_closed_regions_stream_through_before_the_input_ends() -> None:
    closed = Region(1, shapely.box(1, 1, 2, 2), False)

    def endless() -> object:
        while True:
            yield closed

    stream = join_regions(endless(), 0)  # type: ignore[arg-type]
    assert [next(stream) for _ in range(5)] == [closed] * 5


@pytest.mark.full
@settings(max_examples=3)
@given(st.integers(0, 1000))
def test_a_full_block_takes_at_most_ten_seconds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels_HW = rng.integers(0, 4, (512, 512), dtype=np.uint8)
    begin = time.perf_counter()
    regions = block_regions(labels_HW, (0, 0), 16, 1)
    assert time.perf_counter() - begin < 10
    assert shapely.is_valid(geometries(regions)).all()
