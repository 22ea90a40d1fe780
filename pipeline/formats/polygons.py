"""Turn label maps into polygons: borders per block, smoothed and simplified as one coverage, united across blocks.

Suffixes: H rows, W columns, N regions, E pairs of neighbors; `out` pixels of the stored map, of which pixel (x, y)
covers [x, x + 1] x [y, y + 1]. All coordinates are whole multiples of 1 / `STEPS_PER_PX`, because simplification only
removes vertices, and whole numbers on the edge of a block. The union across blocks is therefore exact. It snaps no
vertex and leaves no sliver between neighbors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from pipeline.formats.smooth_borders import STEPS_PER_PX, smooth_corners
from pipeline.formats.tracing import (
    Bools,
    Floats,
    Ids,
    Ints,
    Polygons,
    border_pixels,
    components,
    polygons_of_rings,
    trace,
)


@dataclass(frozen=True)
class Region:
    """One 4-connected region of one class."""

    label: int
    """0 is background, 1..K are the classes."""
    geometry_out: shapely.Polygon
    """Absolute out pixels, y down; valid, normalized, on multiples of 1 / `STEPS_PER_PX`."""
    open: bool
    """Whether the region touches its block's edge and may continue in the next block."""
    may_grow: bool = False
    """Whether the region is not open, but touches an open one that is small and may become part of it in the join."""


def block_regions(
    labels_HW: npt.NDArray[np.uint8],
    origin_out: tuple[int, int],
    min_area_px: float,
    tolerance_px: float,
) -> list[Region]:
    """Return the regions of one block: all of classes, and those of the background that `join_regions` needs.

    labels_HW: 0 is background. origin_out: (x, y) of the block's first pixel. Regions (background too) smaller than
    min_area_px that do not touch the block's edge first become part of the neighbor with the longest shared border.
    Then all borders between regions are smoothed and simplified together (Visvalingam-Whyatt; tolerance_px is the
    square root of the largest triangle removed), so that neighbors stay neighbors. A tolerance of 0 keeps the edges of
    the pixels. The block's own edge is never changed. The order and the bytes of the result depend only on the
    arguments.
    Raises ValueError for labels that are not a non-empty 2-D uint8 array.
    """
    if labels_HW.ndim != 2 or labels_HW.size == 0 or labels_HW.dtype != np.uint8:
        raise ValueError(f"labels must be non-empty 2-D uint8, not {labels_HW.dtype} of shape {labels_HW.shape}")
    ids_HW, labels_N, areas_N = components(labels_HW)
    open_N = _touching_edge(ids_HW, labels_N.size)
    if min_area_px > 1 and np.any((areas_N < min_area_px) & ~open_N):
        group_N, labels_N = _merge_small(labels_N, areas_N.astype(np.float64), open_N, *_neighbors(ids_HW), min_area_px)
        ids_HW, areas_N = group_N.astype(np.int32)[ids_HW], np.bincount(group_N, areas_N).astype(np.int64)
        open_N = _touching_edge(ids_HW, labels_N.size)
    polygons_N = trace(ids_HW, smooth_corners(ids_HW, areas_N) if tolerance_px > 0 else None)
    if tolerance_px > 0:
        polygons_N = shapely.coverage_simplify(polygons_N, tolerance_px, simplify_boundary=False)
    # The area of the polygon counts, as in the join.
    may_grow_N = _beside(open_N & (shapely.area(polygons_N) < min_area_px), ids_HW) & ~open_N
    wanted_N = (labels_N > 0) | open_N | may_grow_N
    polygons_N = _without_straight_vertices(polygons_N[wanted_N], origin_out)
    columns = (labels_N[wanted_N].tolist(), polygons_N, open_N[wanted_N].tolist(), may_grow_N[wanted_N].tolist())
    return [Region(*row) for row in zip(*columns, strict=True)]


def join_regions(regions: Iterable[Region], min_area_px: float) -> Iterator[Region]:
    """Yield the regions of the whole map: closed regions unchanged, open ones united across block borders.

    Open regions of one label that share a border of positive length become one. United regions that are still smaller
    than min_area_px, the limit that `block_regions` got, go to the neighbor with the longest shared border; everything
    outside the blocks counts as background. Background is never yielded. Closed regions that no open one can become
    part of come first, in their order. The others follow in an order independent of the input's; only these are held in
    memory.
    """
    pieces: list[Region] = []
    for region in regions:
        if region.open or region.may_grow:
            pieces.append(region)
        elif region.label > 0:
            yield region
    if not pieces:
        return
    pieces.sort(key=lambda piece: (piece.label, shapely.to_wkb(piece.geometry_out)))
    polygons_N = np.array([piece.geometry_out for piece in pieces], dtype=object)
    labels_N = np.array([piece.label for piece in pieces] + [0], dtype=np.int64)
    areas_N = np.append(shapely.area(polygons_N), np.inf)  # the last one stands for everything outside
    pairs_E2, lengths_E = _shared_borders(polygons_N)
    # A closed region stays as it is unless an open one joins it, even if smoothing made it smaller than the limit.
    fixed_N = np.array([not piece.open for piece in pieces] + [False], dtype=np.bool_)
    group_N, labels_G = _merge_small(labels_N, areas_N, fixed_N, pairs_E2, lengths_E, min_area_px)
    order = np.argsort(group_N[:-1], kind="stable")
    counts_G = np.bincount(group_N[:-1], minlength=labels_G.size)
    members_G = np.split(polygons_N[order], np.cumsum(counts_G)[:-1])
    wanted = [g for g in range(labels_G.size) if labels_G[g] > 0]
    if not wanted:
        return
    united = [members_G[g][0] if counts_G[g] == 1 else _united(members_G[g], min_area_px) for g in wanted]
    united_G = _without_straight_vertices(np.array(united, dtype=object), (0, 0))
    yield from sorted(
        (Region(int(labels_G[g]), polygon, False) for g, polygon in zip(wanted, united_G, strict=True)),
        key=lambda region: (shapely.bounds(region.geometry_out).tolist(), region.label, region.geometry_out.wkb),
    )


def _touching_edge(ids_HW: Ids, count: int) -> Bools:
    touching_N = np.zeros(count, np.bool_)
    for line in (ids_HW[0], ids_HW[-1], ids_HW[:, 0], ids_HW[:, -1]):
        touching_N[line] = True
    return touching_N


def _beside(chosen_N: Bools, ids_HW: Ids) -> Bools:
    """Return which regions share pixel edges with a chosen region."""
    beside_N = np.zeros(chosen_N.size, np.bool_)
    if chosen_N.any():
        first, second = _neighbors(ids_HW)[0].T
        beside_N[second[chosen_N[first]]] = True
        beside_N[first[chosen_N[second]]] = True
    return beside_N


def _neighbors(ids_HW: Ids) -> tuple[Ints, Floats]:
    """Return the pairs of regions that share pixel edges, and the number of edges."""
    below, beside = border_pixels(ids_HW)
    first, second = np.concatenate([below, beside]), np.concatenate([below + ids_HW.shape[1], beside + 1])
    pairs_E2 = np.stack([ids_HW.ravel()[first], ids_HW.ravel()[second]], axis=1).astype(np.int64)
    return _summed_pairs(pairs_E2, np.ones(len(pairs_E2), np.float64))


def _summed_pairs(pairs_E2: Ints, lengths_E: Floats) -> tuple[Ints, Floats]:
    """Return each unordered pair of different regions once, with the sum of its lengths."""
    differ = pairs_E2[:, 0] != pairs_E2[:, 1]
    low, high = pairs_E2[differ].min(axis=1), pairs_E2[differ].max(axis=1)
    width = int(high.max()) + 1 if high.size else 1
    keys, inverse = np.unique(low * width + high, return_inverse=True)
    sums: Floats = np.bincount(inverse, lengths_E[differ], minlength=keys.size).astype(np.float64)
    return np.stack([keys // width, keys % width], axis=1).astype(np.int64), sums


def _merge_small(
    labels_N: Ints, areas_N: Floats, fixed_N: Bools, pairs_E2: Ints, lengths_E: Floats, min_area: float
) -> tuple[Ints, Ints]:
    """Return the group of each region and the label of each group after small regions joined their neighbors.

    Neighbors of one label are one group. In each round every small group picks the neighbor with the longest shared
    border (ties: smallest label, then smallest number); all that picked each other become one, with the label of its
    largest member. Fixed regions never pick. Rounds at least halve the number of small groups (as in Boruvka's method).
    """
    group_N = np.arange(labels_N.size)
    while True:
        same = labels_N[pairs_E2[:, 0]] == labels_N[pairs_E2[:, 1]]
        links_L2 = pairs_E2[same]
        if not links_L2.size:
            small_N = (areas_N < min_area) & ~fixed_N
            sources, targets = np.concatenate([pairs_E2, pairs_E2[:, ::-1]]).T
            lengths = np.concatenate([lengths_E, lengths_E])
            picking = small_N[sources]
            sources, targets, lengths = sources[picking], targets[picking], lengths[picking]
            if not sources.size:
                return group_N, labels_N
            best = _first_of_each(sources, np.lexsort((targets, labels_N[targets], -lengths, sources)))
            links_L2 = np.stack([sources[best], targets[best]], axis=1)
        count = labels_N.size
        graph = csr_array((np.ones(len(links_L2), np.int8), (links_L2[:, 0], links_L2[:, 1])), shape=(count, count))
        _, joined_N = connected_components(graph, directed=False)
        joined_N = joined_N.astype(np.int64)
        largest = _first_of_each(joined_N, np.lexsort((labels_N, -areas_N, ~fixed_N, joined_N)))
        labels_N, areas_N = labels_N[largest], np.bincount(joined_N, areas_N).astype(np.float64)
        fixed_N = np.bincount(joined_N, fixed_N) > 0
        pairs_E2, lengths_E = _summed_pairs(joined_N[pairs_E2], lengths_E)
        group_N = joined_N[group_N]


def _first_of_each(keys: Ints, order: Ints) -> Ints:
    """Return the first index of each key, from indices sorted by key."""
    sorted_keys = keys[order]
    first = np.ones(order.size, np.bool_)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    return order[first]


def _without_straight_vertices(polygons_N: Polygons, shift: tuple[int, int]) -> Polygons:
    """Return the polygons shifted and normalized, without whole-numbered vertices inside an axis-parallel line.

    Such a vertex marks a meeting point of other regions, or a block's edge. Removing it is exact, even after scaling.
    """
    if not polygons_N.size:
        return polygons_N
    _, xy, (ring_offsets, polygon_offsets) = shapely.to_ragged_array(polygons_N)
    sizes = np.diff(ring_offsets) - 1
    unclosed = np.ones(len(xy), np.bool_)
    unclosed[ring_offsets[1:] - 1] = False
    xy = xy[unclosed]
    begins = np.append(0, np.cumsum(sizes))[:-1]
    before, after = np.arange(-1, len(xy) - 1), np.arange(1, len(xy) + 1)
    before[begins], after[begins + sizes - 1] = begins + sizes - 1, begins
    # Other vertices stay, so that `_shared_borders` finds them on both sides.
    straight = ((xy == xy[before]) & (xy == xy[after])).any(axis=1) & (xy == np.rint(xy)).all(axis=1)
    kept_sizes = np.add.reduceat(~straight, begins, dtype=np.int64)
    kept_begins = np.append(0, np.cumsum(kept_sizes))[:-1]
    shifted = xy[~straight] + np.array(shift, np.float64)
    kept_N = polygons_of_rings(shifted, kept_begins, kept_sizes, polygon_offsets)
    return np.asarray(shapely.normalize(kept_N), dtype=object)


def _shared_borders(polygons_N: Polygons) -> tuple[Ints, Floats]:
    """Return pairs of polygons that share a border, and its length in pixels. Number N stands for unshared borders.

    Borders are compared edge by edge. Horizontal and vertical edges are cut at whole pixels, because the two sides may
    be divided there differently. All other edges have the same two ends on both sides.
    """
    _, xy, (ring_offsets, polygon_offsets) = shapely.to_ragged_array(polygons_N)
    corners = np.rint(xy * STEPS_PER_PX).astype(np.int64)
    if not np.array_equal(corners, xy * STEPS_PER_PX):
        raise ValueError(f"regions to join must lie on 1/{STEPS_PER_PX} pixel, as block_regions returns them")
    is_edge = np.ones(len(corners), np.bool_)
    is_edge[ring_offsets[1:] - 1] = False
    first = np.flatnonzero(is_edge)
    piece = np.repeat(np.arange(polygons_N.size), np.diff(ring_offsets[polygon_offsets]))[first]
    piece, begin, end = _cut_at_pixels(piece, corners[first], corners[first + 1])
    low, high = _vertex_keys(begin - corners.min(axis=0)), _vertex_keys(end - corners.min(axis=0))
    low, high = np.minimum(low, high), np.maximum(low, high)
    order = np.lexsort((piece, high, low))
    twin = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    lengths = np.hypot(*((end - begin) / STEPS_PER_PX).T)[order]
    piece = piece[order]
    alone = ~(np.append(False, twin) | np.append(twin, False))
    outside = np.full(np.count_nonzero(alone), polygons_N.size)
    pairs_E2 = np.concatenate(
        [np.stack([piece[:-1][twin], piece[1:][twin]], axis=1), np.stack([piece[alone], outside], axis=1)]
    )
    return _summed_pairs(pairs_E2, np.concatenate([lengths[:-1][twin], lengths[alone]]))


def _cut_at_pixels(piece: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the pieces of edges and their ends, with horizontal and vertical edges cut at whole pixels."""
    low, high = np.minimum(start, stop), np.maximum(start, stop)
    straight = (low == high).any(axis=1)
    start, stop = np.where(straight[:, None], low, start), np.where(straight[:, None], high, stop)
    along = (stop - start).argmax(axis=1)
    at, until = np.take_along_axis(start, along[:, None], 1)[:, 0], np.take_along_axis(stop, along[:, None], 1)[:, 0]
    cut = at // STEPS_PER_PX + 1  # the first whole pixel after the start
    steps = np.where(straight, np.maximum((until - 1) // STEPS_PER_PX - cut + 1, 0) + 1, 1)
    edge = np.repeat(np.arange(len(start)), steps)
    rank = np.arange(len(edge)) - np.repeat(np.cumsum(steps) - steps, steps)
    begin, end, places = start[edge], stop[edge], (cut[edge] + rank) * STEPS_PER_PX
    later, earlier = rank > 0, rank < steps[edge] - 1
    begin[later, along[edge][later]] = places[later] - STEPS_PER_PX
    end[earlier, along[edge][earlier]] = places[earlier]
    return piece[edge], begin, end


def _united(pieces_N: Polygons, min_area_px: float) -> shapely.Polygon:
    """Return one polygon of connected regions of a join.

    Of pieces that are not small, only shells are united: a region in a hole touches neither its block's edge nor a
    small region that does, so no other piece lies in the hole. With tens of thousands of holes this takes a fraction of
    the time.
    """
    small_N = shapely.area(pieces_N) < min_area_px
    shells_N = shapely.polygons(shapely.get_exterior_ring(pieces_N))
    union = shapely.union_all(np.where(small_N, pieces_N, shells_N))
    holes = np.append(_holes(np.array([union])), _holes(np.where(small_N, shells_N, pieces_N)))
    return shapely.polygons(shapely.get_exterior_ring(union), holes=holes)


def _holes(polygons_N: Polygons) -> Polygons:
    rings, owner = shapely.get_rings(polygons_N, return_index=True)
    is_shell = np.append(True, owner[1:] != owner[:-1])
    return np.asarray(rings[~is_shell], dtype=object)


def _vertex_keys(xy_N2: Ints) -> Ints:
    return (xy_N2[:, 0] << 31) | xy_N2[:, 1]
