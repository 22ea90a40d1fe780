from __future__ import annotations

import numpy as np
import shapely
from hypothesis import given
from scipy import ndimage

from pipeline.formats.tracing import border_pixels, components, trace
from tests.pipeline.formats.label_maps import Labels, label_maps


@given(label_maps(max_side=8))
def test_the_polygon_of_a_region_is_the_union_of_its_pixels(labels_HW: Labels) -> None:
    ids_HW, labels_N, areas_N = components(labels_HW)
    polygons_N = trace(ids_HW, None)
    assert len(polygons_N) == len(labels_N)
    for number, polygon in enumerate(polygons_N):
        y, x = np.nonzero(ids_HW == number)
        assert set(labels_HW[y, x].tolist()) == {labels_N[number]}
        assert len(y) == areas_N[number]
        assert polygon.equals(shapely.union_all(shapely.box(x, y, x + 1, y + 1)))


@given(label_maps(classes=2))
def test_regions_are_numbered_by_label_and_first_pixel_as_if_each_label_were_searched(labels_HW: Labels) -> None:
    expected_HW = np.full(labels_HW.shape, -1)
    expected_labels: list[int] = []
    for label in np.unique(labels_HW).tolist():
        part_HW, count = ndimage.label(labels_HW == label)
        expected_HW[part_HW > 0] = part_HW[part_HW > 0] - 1 + len(expected_labels)
        expected_labels += [label] * count
    ids_HW, labels_N, areas_N = components(labels_HW)
    np.testing.assert_array_equal(ids_HW, expected_HW)
    assert labels_N.tolist() == expected_labels
    assert areas_N.tolist() == np.bincount(expected_HW.ravel()).tolist()


@given(label_maps(max_side=6))
def test_border_pixels_differ_from_the_pixel_below_or_to_the_right(labels_HW: Labels) -> None:
    height, width = labels_HW.shape
    numbered = [(y, x, y * width + x) for y in range(height) for x in range(width)]
    below, beside = border_pixels(labels_HW.astype(np.int32))
    assert below.tolist() == [n for y, x, n in numbered if y + 1 < height and labels_HW[y, x] != labels_HW[y + 1, x]]
    assert beside.tolist() == [n for y, x, n in numbered if x + 1 < width and labels_HW[y, x] != labels_HW[y, x + 1]]


def test_neighbors_share_the_corners_that_were_moved() -> None:
    corners_YX2 = np.stack(np.meshgrid(np.arange(3.0), np.arange(2.0)), axis=2)
    corners_YX2[0, 1] = 1.25, 0
    left, right = trace(np.array([[0, 1]]), corners_YX2)
    assert left.equals(shapely.Polygon([(0, 0), (1.25, 0), (1, 1), (0, 1)]))
    assert right.equals(shapely.Polygon([(1.25, 0), (2, 0), (2, 1), (1, 1)]))
