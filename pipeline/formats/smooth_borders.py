"""Smooth the borders between regions, which follow the edges of pixels in steps.

Each corner of a pixel on a border moves to the mean of the corners around it along the border, step by step (surface
nets, Gibson 1998). A mean also shrinks what is round, so the part of the borders that the mean lost is smoothed as
well and added (twicing, Tukey 1977): a disk of 500 µm² loses 1 % of its area.

A corner moves by less than half a pixel in x and y, so it stays inside a square around its old place that no other
corner can enter. Each border edge therefore lies in the two squares of its ends, and cannot cross another edge. Regions
keep their neighbors and holes, and share their corners as before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from pipeline.formats.tracing import Ids, border_pixels

STEPS_PER_PX = 64
"""Smoothed corners lie on this fraction of a pixel, so that sums and unions of regions are exact."""

_ROUNDS = 20
"""Rounds of a mean. Steps of up to nine pixels lose five sixths of their height."""

_FURTHEST = 0.45
"""Largest distance in x and in y, in pixels, that a corner moves. It must be below 0.5."""

_SMALLEST_PX = 64
"""Regions of fewer pixels keep their corners: they would lose more than 4 % of their area."""


def smooth_corners(ids_HW: Ids, areas_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the (x, y) of each corner of a pixel of a region map, (H + 1, W + 1, 2), after smoothing.

    `areas_N` has the number of pixels of each region.
    Corners on the map's edge, inside regions and on small regions stay in their places.
    """
    height, width = ids_HW.shape
    columns = width + 1
    below, beside = border_pixels(ids_HW)
    # The west or north end of each border edge, and the other end.
    across, along = below + below // width + columns, beside + beside // width + 1
    starts, ends = np.concatenate([across, along]), np.concatenate([across + 1, along + columns])
    on_border = np.zeros((height + 1) * columns, np.bool_)
    on_border[starts] = on_border[ends] = True
    vertices = np.flatnonzero(on_border)
    place = np.empty(on_border.size, np.int32)  # of each border corner in `vertices`; the others are never read
    place[vertices] = np.arange(vertices.size)
    start_E, end_E = place[starts], place[ends]
    y, x = np.divmod(vertices, columns)
    is_free = ((y > 0) & (y < height) & (x > 0) & (x < width)) & ~_on_region(areas_N < _SMALLEST_PX, ids_HW, y, x)
    mean = _half_way_to_the_mean(start_E, end_E, is_free)
    before = np.stack([x, y], axis=1).astype(np.float64)
    once = _rounds(mean, before)
    after = once + _rounds(mean, before - once)
    moved = np.clip(after - before, -_FURTHEST, _FURTHEST)
    xy_YX2 = np.empty((height + 1, columns, 2))
    xy_YX2[..., 0], xy_YX2[..., 1] = np.arange(columns), np.arange(height + 1)[:, None]
    xy_YX2[y, x] = before + np.round(moved * STEPS_PER_PX) / STEPS_PER_PX
    return xy_YX2


def _on_region(
    chosen_N: npt.NDArray[np.bool_],
    ids_HW: Ids,
    y_V: npt.NDArray[np.int64],
    x_V: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Return which corners belong to a pixel of a chosen region. Meaningless for corners on the map's edge."""
    y_V, x_V = np.minimum(y_V, ids_HW.shape[0] - 1), np.minimum(x_V, ids_HW.shape[1] - 1)
    around = [chosen_N[ids_HW[y_V - dy, x_V - dx]] for dy in (0, 1) for dx in (0, 1)]
    return np.asarray(np.logical_or.reduce(around))


def _half_way_to_the_mean(
    start_E: npt.NDArray[np.int64], end_E: npt.NDArray[np.int64], is_free: npt.NDArray[np.bool_]
) -> csr_array:
    """Return the matrix that moves each free vertex half the way to the mean of its neighbors."""
    count = is_free.size
    own, other = np.concatenate([start_E, end_E]), np.concatenate([end_E, start_E])
    own, other = own[is_free[own]], other[is_free[own]]
    degree = np.bincount(own, minlength=count)
    every = np.arange(count)
    weights = np.concatenate([0.5 / degree[own], np.where(is_free, 0.5, 1.0)])
    places = np.concatenate([own, every]), np.concatenate([other, every])
    return csr_array((weights, places), shape=(count, count))


def _rounds(mean: csr_array, xy_V2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    for _ in range(_ROUNDS):
        xy_V2 = mean @ xy_V2
    return xy_V2
