from __future__ import annotations

import numpy as np
import shapely
from hypothesis import given

from pipeline.formats.tracing import components, trace
from tests.pipeline.formats.label_maps import Labels, label_maps


@given(label_maps(max_side=8))
def test_the_polygon_of_a_region_is_the_union_of_its_pixels(labels_HW: Labels) -> None:
    ids_HW, labels_N = components(labels_HW)
    polygons_N = trace(ids_HW, None)
    assert len(polygons_N) == len(labels_N)
    for number, polygon in enumerate(polygons_N):
        y, x = np.nonzero(ids_HW == number)
        assert set(labels_HW[y, x].tolist()) == {labels_N[number]}
        assert polygon.equals(shapely.union_all(shapely.box(x, y, x + 1, y + 1)))


def test_neighbors_share_the_corners_that_were_moved() -> None:
    corners_YX2 = np.stack(np.meshgrid(np.arange(3.0), np.arange(2.0)), axis=2)
    corners_YX2[0, 1] = 1.25, 0
    left, right = trace(np.array([[0, 1]]), corners_YX2)
    assert left.equals(shapely.Polygon([(0, 0), (1.25, 0), (1, 1), (0, 1)]))
    assert right.equals(shapely.Polygon([(1.25, 0), (2, 0), (2, 1), (1, 1)]))
