"""Polygons as pixels: which polygon has the center of each pixel.

Pillow's own polygons cover every pixel that they touch, so that a neighbor or a hole depends on the order of drawing.

Suffixes: H, W pixels; P points; E edges; N crossings of an edge and a row of pixel centers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import shapely
from numpy.typing import NDArray

_BATCH = 1024  # polygons as arrays at a time; this bounds the memory


def rasterize(
    polygons_l0: Iterable[tuple[int, shapely.Polygon]], size_HW: tuple[int, int], l0_per_px: tuple[float, float]
) -> NDArray[np.int64]:
    """Return the number of the polygon that contains the center of each pixel, (H, W); 0 for none.

    polygons_l0: a positive number and a valid polygon each, side by side in any order. A center where two of them
    overlap belongs to none. l0_per_px: width and height of a pixel in the polygons' coordinates; pixel (0, 0) begins
    at the origin. Neighbors that share an edge share no center and leave none out.
    """
    height, width = size_HW
    # What changes at each center, from the one to its left: how many polygons contain it, and the sum of their numbers.
    # The last column is beyond the picture.
    count_HW, sum_HW = (np.zeros((height, width + 1), np.int64) for _ in range(2))
    stream = iter(polygons_l0)
    while batch := list(itertools.islice(stream, _BATCH)):
        numbers, polygons = zip(*batch, strict=True)
        oriented = shapely.orient_polygons(np.array(polygons, dtype=object), exterior_cw=False)
        _, xy_P, (ring_offsets, polygon_offsets) = shapely.to_ragged_array(oriented)
        number_P = np.repeat(np.array(numbers, np.int64), np.diff(ring_offsets[polygon_offsets]))
        is_edge = np.ones(len(xy_P), np.bool_)
        is_edge[ring_offsets[1:] - 1] = False
        first = np.flatnonzero(is_edge)
        # From here on, the center of pixel (x, y) is at (x, y).
        xy_P = xy_P / np.array(l0_per_px) - 0.5
        row_N, column_N, edge_N = _crossings(xy_P[first], xy_P[first + 1], size_HW)
        # Inside is to the left of an edge's direction.
        enters_E = np.where(xy_P[first, 1] > xy_P[first + 1, 1], 1, -1)
        np.add.at(count_HW, (row_N, column_N), enters_E[edge_N])
        np.add.at(sum_HW, (row_N, column_N), (enters_E * number_P[first])[edge_N])
    alone_HW = np.cumsum(count_HW[:, :-1], axis=1) == 1
    return np.where(alone_HW, np.cumsum(sum_HW[:, :-1], axis=1), 0)


def _crossings(
    start_E: NDArray[np.float64], stop_E: NDArray[np.float64], size_HW: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the row, the first column at or right of the crossing, and the edge of each crossing."""
    height, width = size_HW
    # Both polygons beside an edge must get the same crossing, to the last bit. Always begin at the edge's upper end.
    downward_E = (start_E[:, 1] <= stop_E[:, 1])[:, None]
    high_E, low_E = np.where(downward_E, start_E, stop_E), np.where(downward_E, stop_E, start_E)
    begin_E, end_E = (np.clip(np.ceil(end[:, 1]), 0, height).astype(np.int64) for end in (high_E, low_E))
    counts_E = end_E - begin_E
    edge_N = np.repeat(np.arange(len(counts_E)), counts_E)
    row_N = begin_E[edge_N] + np.arange(len(edge_N)) - np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    (x_N, y_N), (right_N, down_N) = high_E[edge_N].T, (low_E - high_E)[edge_N].T
    column_N = np.clip(np.ceil(x_N + (row_N - y_N) * right_N / down_N), 0, width).astype(np.int64)
    return row_N, column_N, edge_N
