from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.polygons import block_regions
from pipeline.formats.raster import rasterize
from tests.pipeline.formats.label_maps import Labels, label_maps, smooth_map


@given(label_maps(), st.floats(0, 9), st.floats(0, 3), st.floats(0.3, 5), st.floats(0.3, 5), st.integers(0, 2**32))
def test_each_pixel_has_the_polygon_that_contains_its_center(
    labels_HW: Labels, min_area_px: float, tolerance_px: float, px_width: float, px_height: float, seed: int
) -> None:
    regions = block_regions(labels_HW, (0, 0), min_area_px, tolerance_px)
    polygons = [(number, region.geometry_out) for number, region in enumerate(regions, start=1)]
    size_HW = int(labels_HW.shape[0] / px_height) + 2, int(labels_HW.shape[1] / px_width) + 2
    found_HW = rasterize(polygons, size_HW, (px_width, px_height))
    y_HW, x_HW = (np.indices(size_HW) + 0.5) * np.array([px_height, px_width])[:, None, None]
    points_HW = shapely.points(x_HW, y_HW)
    for number, polygon in polygons:
        differs_HW = (found_HW == number) != shapely.contains_xy(polygon, x_HW, y_HW)
        # A center on a border may belong to either side.
        assert (shapely.distance(polygon.boundary, points_HW[differs_HW]) < 1e-9).all()
    shuffled = [polygons[i] for i in np.random.default_rng(seed).permutation(len(polygons))]
    np.testing.assert_array_equal(rasterize(shuffled, size_HW, (px_width, px_height)), found_HW)


@given(label_maps())
def test_neighbors_leave_no_center_out(labels_HW: Labels) -> None:
    """Every center lies on a border here, and belongs to exactly one side."""
    height, width = labels_HW.shape
    regions = block_regions(labels_HW + 1, (0, 0), 0, 0)
    polygons = [
        (number, shapely.affinity.translate(region.geometry_out, 0.5, 0.5)) for number, region in enumerate(regions, 1)
    ]
    found_HW = rasterize(polygons, (height + 1, width + 1), (1.0, 1.0))
    assert (found_HW > 0).sum() == height * width


def test_labels_come_back_from_their_own_polygons() -> None:
    labels_HW = smooth_map(300, 6.0)
    regions = block_regions(labels_HW, (0, 0), 0, 0)
    assert len(regions) > 20
    polygons = ((region.label, region.geometry_out) for region in regions if region.label)
    np.testing.assert_array_equal(rasterize(polygons, (300, 300), (1.0, 1.0)), labels_HW)


def test_many_polygons_are_taken_in_batches() -> None:
    polygons = ((1 + x + 64 * y, shapely.box(x, y, x + 1, y + 1)) for y in range(64) for x in range(64))
    np.testing.assert_array_equal(rasterize(polygons, (64, 64), (1, 1)), np.arange(1, 4097).reshape(64, 64))


def test_parts_beyond_the_picture_are_cut_off() -> None:
    polygon = shapely.Polygon([(-5, -5), (25, -5), (25, 3), (2, 3), (2, 25), (-5, 25)])
    expected_HW = np.ones((10, 10), int)
    expected_HW[3:, 2:] = 0
    np.testing.assert_array_equal(rasterize([(1, polygon)], (10, 10), (1, 1)), expected_HW)


def test_a_center_in_two_polygons_belongs_to_none() -> None:
    polygons = [(7, shapely.box(0, 0, 3, 1)), (9, shapely.box(2, 0, 4, 1))]
    assert rasterize(polygons, (1, 5), (1, 1)).tolist() == [[7, 7, 0, 9, 0]]


@pytest.mark.parametrize("exterior_cw", [True, False])
def test_the_direction_of_rings_does_not_matter(exterior_cw: bool) -> None:
    ring = shapely.box(0, 0, 4, 4).difference(shapely.box(1, 1, 3, 3))
    found_HW = rasterize([(1, shapely.orient_polygons(ring, exterior_cw=exterior_cw))], (4, 4), (1, 1))
    assert found_HW.sum() == 12


def test_no_polygons_give_zeros() -> None:
    assert not rasterize([], (3, 2), (1, 1)).any()
