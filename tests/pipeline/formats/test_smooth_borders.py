from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.formats.polygons import block_regions
from pipeline.formats.smooth_borders import smooth_corners
from tests.bench.edges import axis_parallel_share
from tests.pipeline.formats.label_maps import Labels, geometries, label_maps, rasterized

SMOOTHED = 1e-6
"""A tolerance at which borders are smoothed, and only vertices inside straight lines are removed."""


def grid(labels_HW: Labels) -> NDArray[np.float64]:
    """Return the (x, y) of each corner of a pixel."""
    rows, columns = np.mgrid[: labels_HW.shape[0] + 1, : labels_HW.shape[1] + 1]
    return np.stack([columns, rows], axis=2).astype(np.float64)


@st.composite
def large_regions(draw: st.DrawFn) -> Labels:
    """Return maps of squares of 9 pixels, most of which are large enough to be smoothed, with some pixels changed."""
    labels_HW = draw(label_maps(max_side=3)).repeat(9, axis=0).repeat(9, axis=1)
    for place in draw(st.lists(st.integers(0, labels_HW.size - 1), max_size=20)):
        labels_HW.ravel()[place] = draw(st.integers(0, 3))
    return labels_HW


@settings(max_examples=40)
@given(large_regions())
def test_smoothed_polygons_keep_the_center_of_each_pixel(labels_HW: Labels) -> None:
    """So no region is lost, and each keeps its neighbors and holes."""
    regions = block_regions(labels_HW + np.uint8(1), (7, 3), 0, SMOOTHED)
    polygons = geometries(regions)
    assert shapely.is_valid(polygons).all()
    np.testing.assert_array_equal(rasterized(regions, labels_HW.shape, (7, 3)), labels_HW + 1)
    exact = block_regions(labels_HW + np.uint8(1), (7, 3), 0, 0)
    assert [len(r.geometry_out.interiors) for r in regions] == [len(r.geometry_out.interiors) for r in exact]
    # No gap and no overlap: all coordinates are dyadic, so the areas are exact.
    assert shapely.area(polygons).sum() == labels_HW.size
    assert shapely.union_all(polygons).area == labels_HW.size


@settings(max_examples=40)
@given(large_regions())
def test_corners_move_less_than_half_a_pixel_and_not_on_the_edge(labels_HW: Labels) -> None:
    moved_YX2 = smooth_corners(labels_HW.astype(np.int64), np.bincount(labels_HW.ravel())) - grid(labels_HW)
    assert np.abs(moved_YX2).max() <= 0.46875
    assert not moved_YX2[[0, -1]].any()
    assert not moved_YX2[:, [0, -1]].any()


def test_steps_of_a_large_border_move_and_a_small_region_keeps_its_corners() -> None:
    rows, columns = np.mgrid[:40, :40]
    labels_HW = (rows > columns).astype(np.int64)
    labels_HW[4:10, 28:36] = 2
    moved_YX2 = smooth_corners(labels_HW, np.bincount(labels_HW.ravel())) - grid(labels_HW.astype(np.uint8))
    assert not moved_YX2[4:11, 28:37].any()
    assert np.abs(moved_YX2[20, 19:21]).max() == 0.25  # the line runs through the middle of the steps


@pytest.mark.parametrize("slope", [0.1, 0.3, 0.7, 1.0, 3.0])
def test_a_slanted_border_has_neither_steps_nor_spikes(slope: float) -> None:
    side = 96
    rows, columns = np.mgrid[:side, :side] + 0.5
    middle = side / 2
    labels_HW = (1 + (rows - middle > slope * (columns - middle))).astype(np.uint8)
    regions = block_regions(labels_HW, (0, 0), 0, 1.0)
    shared = shapely.intersection(*[region.geometry_out.boundary for region in regions])
    places = shapely.get_coordinates(shapely.segmentize(shapely.line_merge(shared), 0.5))
    inner = places[(places > 8).all(axis=1) & (places < side - 8).all(axis=1)]
    distance = np.abs(inner[:, 1] - middle - slope * (inner[:, 0] - middle)) / math.hypot(1, slope)
    assert len(inner) > 20
    assert distance.max() < 0.5
    assert axis_parallel_share([shapely.clip_by_rect(shared, 8, 8, side - 8, side - 8)]) < 0.1


@pytest.mark.parametrize(("radius", "lost"), [(6.3, 0.02), (12, 0.003), (25, 0.001)])
def test_a_disk_keeps_its_area(radius: float, lost: float) -> None:
    rows, columns = np.mgrid[:60, :60] + 0.5
    labels_HW = ((rows - 30.2) ** 2 + (columns - 29.7) ** 2 <= radius**2).astype(np.uint8)
    (region,) = (r for r in block_regions(labels_HW, (0, 0), 0, SMOOTHED) if r.label)
    assert region.geometry_out.area == pytest.approx(labels_HW.sum(), rel=lost)
