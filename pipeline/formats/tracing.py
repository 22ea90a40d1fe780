"""Trace the borders of the 4-connected regions of a label map, and make polygons of them.

Suffixes: H rows, W columns, N regions, M directed edges, R rings, Y and X corners of pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]
"""Region numbers. As int32, a map of them takes half the memory and less time."""
Polygons = npt.NDArray[np.object_]


def components(labels_HW: npt.NDArray[np.uint8]) -> tuple[Ids, Ints, Ints]:
    """Return ids_HW of the 4-connected regions, 0..N-1, and the label and the number of pixels of each region.

    Regions are numbered by their label, then by their first pixel, row by row.
    """
    height, width = labels_HW.shape
    begins_HW = np.ones((height, width), np.bool_)
    np.not_equal(labels_HW[:, 1:], labels_HW[:, :-1], out=begins_HW[:, 1:])
    # Runs: the longest pieces of rows with one label. There are far fewer of them than pixels.
    first_R = np.flatnonzero(begins_HW)
    label_R = labels_HW.ravel()[first_R].astype(np.int64)
    # Two runs in neighboring rows overlap if and only if they overlap in the first column of one of them.
    upper_R, lower_R = first_R >= width, first_R < labels_HW.size - width
    run_R = np.arange(first_R.size)
    above = np.concatenate([np.searchsorted(first_R, first_R[upper_R] - width, side="right") - 1, run_R[lower_R]])
    below = np.concatenate([run_R[upper_R], np.searchsorted(first_R, first_R[lower_R] + width, side="right") - 1])
    same = label_R[above] == label_R[below]
    links = (np.ones(np.count_nonzero(same), np.int8), (above[same], below[same]))
    count, region_R = connected_components(csr_array(links, shape=(run_R.size, run_R.size)), directed=False)
    labels_N = np.empty(count, np.int64)
    labels_N[region_R] = label_R
    lengths_R = np.diff(first_R, append=labels_HW.size)
    areas_N = np.bincount(region_R, lengths_R).astype(np.int64)
    # `connected_components` numbers regions by their first run.
    order = np.argsort(labels_N, kind="stable")
    number_N = np.empty(count, np.int32)
    number_N[order] = np.arange(count)
    ids_HW = np.repeat(number_N[region_R], lengths_R).reshape(height, width)
    return ids_HW, labels_N[order], areas_N[order]


def border_pixels(ids_HW: Ids) -> tuple[Ints, Ints]:
    """Return the pixels that differ from the pixel below, and those that differ from the pixel to the right.

    Pixels are numbered row by row.
    """
    below = np.flatnonzero(ids_HW[:-1] != ids_HW[1:])
    beside = np.flatnonzero(ids_HW[:, :-1] != ids_HW[:, 1:])
    return below, beside + beside // max(1, ids_HW.shape[1] - 1)


def trace(ids_HW: Ids, corners_YX2: Floats | None) -> Polygons:
    """Return the polygon of each 4-connected region 0..N-1 with its holes, from the corner (0, 0).

    `corners_YX2` has the place of each corner of a pixel. If it is None, the corners form a grid.

    Directed pixel edges run with their region on the right. If a region touches itself in a corner, its border takes
    the turn that separates the shell from the hole, so every ring is simple and every polygon valid. Vertices are all
    corners of pixels; of a grid, those at which a border turns or three or more borders meet. So the polygons are an
    edge-matched coverage.
    """
    height, width = ids_HW.shape
    stride, columns, vertices = width + 2, width + 1, (height + 1) * (width + 1)
    around = np.full((height + 2, stride), -1, np.int32)
    around[1:-1, 1:-1] = ids_HW
    padded = around.ravel()
    # The four pixels around a vertex, as offsets from the north-west one in the padded map.
    nw, ne, sw, se = 0, 1, stride, stride + 1
    # heading east, south, west, north: pixel on the right and on the left of the way ahead of a vertex
    ahead = ((se, ne), (sw, se), (nw, sw), (ne, nw))
    step = (1, columns, -1, -columns)
    # The vertices with an edge to the east and to the south. From its other end, the same edge leads west or north.
    to_east = np.flatnonzero(around[:-1, 1:] != around[1:, 1:])
    to_south = np.flatnonzero(around[1:, :-1] != around[1:, 1:])
    starts = (to_east, to_south, to_east + 1, to_south + columns)

    number = np.empty((4, vertices), np.int32)  # of each existing directed edge; the others are never read
    heads: list[Ints] = []
    owners: list[Ints] = []
    nexts: list[Ints] = []
    corners: list[Bools] = []
    edges = 0
    for heading, (to_right, to_left) in enumerate(ahead):
        owner = padded[_north_west(starts[heading], columns) + to_right]
        start, owner = starts[heading][owner >= 0], owner[owner >= 0]
        number[heading, start] = np.arange(edges, edges + start.size)
        edges += start.size
        head = start + step[heading]
        at_head = _north_west(head, columns)
        goes_left, goes_on = padded[at_head + to_left] == owner, padded[at_head + to_right] == owner
        turn = np.where(goes_left, 3, np.where(goes_on, 0, 1))
        heads.append(head)
        owners.append(owner)
        nexts.append((heading + turn) % 4 * vertices + head)
        if corners_YX2 is None:
            pixels = [padded[at_head + offset] for offset in (nw, ne, se, sw)]
            degree = sum((a != b).view(np.int8) for a, b in pairwise([*pixels, pixels[0]]))
            corners.append((turn != 0) | (degree > 2))
        else:
            corners.append(np.ones(head.size, np.bool_))
    head_M, owner_M, corner_M = np.concatenate(heads), np.concatenate(owners), np.concatenate(corners)
    ring_M, walk_M = _walk_cycles(number.ravel()[np.concatenate(nexts)].astype(np.int64))

    walk = walk_M[corner_M[walk_M]]
    ring = ring_M[walk]
    begins = np.flatnonzero(np.append(True, ring[1:] != ring[:-1]))
    sizes = np.diff(np.append(begins, ring.size))
    if corners_YX2 is None:
        xy = np.stack(np.divmod(head_M[walk], columns)[::-1], axis=1).astype(np.float64)
    else:
        xy = corners_YX2.reshape(-1, 2)[head_M[walk]]
    following = np.arange(1, ring.size + 1)
    following[begins + sizes - 1] = begins
    doubled_area = np.add.reduceat(xy[:, 0] * xy[following, 1] - xy[following, 0] * xy[:, 1], begins)
    owner_R = owner_M[walk[begins]]
    order = np.lexsort((begins, doubled_area < 0, owner_R))  # by region, its shell first
    polygon_offsets = np.append(0, np.cumsum(np.bincount(owner_R)))
    return polygons_of_rings(xy, begins[order], sizes[order], polygon_offsets)


def _north_west(vertex: Ints, columns: int) -> Ints:
    """Return the index, in the padded map, of the pixel north-west of vertices."""
    return vertex + vertex // columns


def _walk_cycles(next_M: Ints) -> tuple[Ints, Ints]:
    """Return the cycle of each element of a permutation, and all elements cycle by cycle, each in its order."""
    size = next_M.size
    graph = csr_array((np.ones(size, np.int8), next_M, np.arange(size + 1)), shape=(size, size))
    count, cycle_M = connected_components(graph, directed=True, connection="weak")
    starts = np.empty(count, np.int64)
    starts[cycle_M[::-1]] = np.arange(size)[::-1]
    # Each cycle's end leads to the start of the next cycle instead of its own: one path, along which a depth-first
    # search is a walk in compiled code (over one root with a child per cycle it would be quadratic).
    path_M = next_M.copy()
    ends = np.flatnonzero(next_M == starts[cycle_M])
    path_M[ends] = np.append(starts, starts[-1])[cycle_M[ends] + 1]
    path = csr_array((np.ones(size, np.int8), path_M, np.arange(size + 1)), shape=(size, size))
    walk = depth_first_order(path, starts[0], directed=True, return_predecessors=False)
    return cycle_M.astype(np.int64), walk.astype(np.int64)


def polygons_of_rings(xy: Floats, begins: Ints, sizes: Ints, polygon_offsets: Ints) -> Polygons:
    """Return polygons from unclosed rings: each has `sizes` vertices of `xy`, the first one at `begins`.

    `polygon_offsets` has the number of the first ring of each polygon, its shell, and at last the number of all rings.
    """
    ring_offsets = np.append(0, np.cumsum(sizes + 1))
    index = np.arange(ring_offsets[-1]) + np.repeat(begins - ring_offsets[:-1], sizes + 1)
    index[ring_offsets[1:] - 1] = begins
    offsets = (ring_offsets, polygon_offsets)
    polygons: Any = shapely.from_ragged_array(shapely.GeometryType.POLYGON, xy[index], offsets)
    return np.asarray(polygons, dtype=object)
