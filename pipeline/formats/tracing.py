"""Trace the borders of the 4-connected regions of a label map, and make polygons of them.

Suffixes: H rows, W columns, N regions, M directed edges, R rings, Y and X corners of pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Polygons = npt.NDArray[np.object_]


def components(labels_HW: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Return ids_HW of the 4-connected regions, 0..N-1, and the label of each region."""
    ids_HW = np.zeros(labels_HW.shape, np.int64)
    labels: list[int] = []
    for label in np.unique(labels_HW).tolist():
        mask_HW = labels_HW == label
        part_HW, count = ndimage.label(mask_HW)
        ids_HW[mask_HW] = part_HW[mask_HW] + (len(labels) - 1)
        labels += [label] * count
    return ids_HW, np.array(labels, np.int64)


def trace(ids_HW: Ints, corners_YX2: Floats | None) -> Polygons:
    """Return the polygon of each 4-connected region 0..N-1 with its holes, from the corner (0, 0).

    `corners_YX2` has the place of each corner of a pixel. If it is None, the corners form a grid.

    Directed pixel edges run with their region on the right. If a region touches itself in a corner, its border takes
    the turn that separates the shell from the hole, so every ring is simple and every polygon valid. Vertices are all
    corners of pixels; of a grid, those at which a border turns or three or more borders meet. So the polygons are an
    edge-matched coverage.
    """
    height, width = ids_HW.shape
    stride, columns, vertices = width + 2, width + 1, (height + 1) * (width + 1)
    around = np.pad(ids_HW.astype(np.int32), 1, constant_values=-1)
    padded = around.ravel()
    # For each of the four pixels around a vertex: its offset from the north-west pixel in the padded map, and a view of
    # this pixel for all vertices. A view takes a fraction of the time of indexing.
    nw, ne, sw, se = (
        (down * stride + right, around[down : down + height + 1, right : right + columns])
        for down in (0, 1)
        for right in (0, 1)
    )
    # heading east, south, west, north: pixel on the right and on the left of the way ahead of a vertex
    ahead = ((se, ne), (sw, se), (nw, sw), (ne, nw))
    step = (1, columns, -1, -columns)
    degree = sum((a != b).view(np.int8) for (_, a), (_, b) in ((nw, ne), (ne, se), (se, sw), (sw, nw))).ravel()

    number = np.empty((4, vertices), np.int32)  # of each existing directed edge; the others are never read
    heads: list[Ints] = []
    owners: list[Ints] = []
    nexts: list[Ints] = []
    corners: list[Bools] = []
    edges = 0
    for heading, ((to_right, right), (to_left, left)) in enumerate(ahead):
        start = np.flatnonzero((right != left) & (right >= 0))
        number[heading, start] = np.arange(edges, edges + start.size)
        edges += start.size
        owner, head = padded[_north_west(start, columns) + to_right], start + step[heading]
        at_head = _north_west(head, columns)
        goes_left, goes_on = padded[at_head + to_left] == owner, padded[at_head + to_right] == owner
        turn = np.where(goes_left, 3, np.where(goes_on, 0, 1))
        heads.append(head)
        owners.append(owner)
        nexts.append((heading + turn) % 4 * vertices + head)
        corners.append((turn != 0) | (degree[head] > 2) | (corners_YX2 is not None))
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
