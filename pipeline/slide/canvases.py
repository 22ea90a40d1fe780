"""Cover the tissue of a block with canvases: rectangles that pass the networks at once.

The cores of the canvases do not overlap and contain all tissue of the block. Around each core lies the model's margin,
which is computed but not used, so few large canvases compute fewer pixels than many small ones. Small canvases follow
the border of the tissue more closely.

Shape suffixes: H and W the map of the block, R rows and C columns of cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box
from wsi.grid import Block, Grid

CELL_M = 32
"""Model pixels on which cores start and end: every stride of a network divides them."""


def canvas_cores(grid: Grid, tissue_HW: NDArray[np.bool_], block: Block, margin: int, canvas_m: int) -> list[Box]:
    """Return the cores, in model pixels, of the canvases of a block. `tissue_HW` is the block's `block_tissue`.

    A canvas, which is a core with `margin` pixels on all sides, has sides of at most `canvas_m` pixels.
    """
    origin_m = grid.box_m(block.box_out)
    found = _cover(
        _cells(tissue_HW, CELL_M // grid.m_per_out), margin / CELL_M, max(1, (canvas_m - 2 * margin) // CELL_M)
    )
    return [
        Box(origin_m.x + CELL_M * x, origin_m.y + CELL_M * y, CELL_M * width, CELL_M * height)
        for x, y, width, height in found
    ]


def with_margin(core_m: Box, margin: int) -> Box:
    """Return the canvas of a core."""
    return Box(core_m.x - margin, core_m.y - margin, core_m.width + 2 * margin, core_m.height + 2 * margin)


def _cells(tissue_HW: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Return which cells of `side` map pixels contain tissue, (R, C)."""
    height, width = tissue_HW.shape
    # First the rows, then the columns: reducing both axes at once takes seven times as long.
    has_RW = tissue_HW.reshape(height // side, side, width).any(axis=1)
    return np.asarray(has_RW.reshape(height // side, width // side, side).any(axis=2))


def _cover(has_RC: NDArray[np.bool_], margin: float, side: float) -> Iterator[Box]:
    """Yield boxes of cells that contain all cells with tissue, by cutting the bounding box as long as that pays."""
    box = _bounds(has_RC)
    if box is None:
        return
    rows, columns = box.slices(Box(0, 0, *has_RC.shape[::-1]))
    has_RC = has_RC[rows, columns]
    cost, axis, position = _best_cut(has_RC, margin, side)
    fits = max(box.height, box.width) <= side
    if position and (cost < _cost(box.height, box.width, margin, side) or not fits):
        first, second = np.split(has_RC, [position], axis=axis)
        dx, dy = (0, position) if axis == 0 else (position, 0)
        yield from (part.shift(box.x, box.y) for part in _cover(first, margin, side))
        yield from (part.shift(box.x + dx, box.y + dy) for part in _cover(second, margin, side))
    else:
        yield box


def _cost(height: Any, width: Any, margin: float, side: float) -> Any:
    """Return the area of the canvases that a core of this size (numbers or arrays) is cut into."""
    return (height + 2 * margin * np.ceil(height / side)) * (width + 2 * margin * np.ceil(width / side))


def _best_cut(has_RC: NDArray[np.bool_], margin: float, side: float) -> tuple[float, int, int]:
    """Return the cost, axis and position of the cut whose halves need the fewest pixels; (inf, 0, 0) for none.

    Among cuts of equal cost, the one nearest to even parts is chosen. `has_RC` equals its own bounding box.
    """
    best = (math.inf, 0.0, 0, 0)
    for axis in (0, 1):
        across_RC = has_RC if axis == 0 else has_RC.T
        length, width = across_RC.shape
        if length == 1:
            continue
        parts = max(2, math.ceil(length / side))
        even = length * (parts // 2) / parts
        filled_R = across_RC.any(axis=1)
        first_R = np.where(filled_R, across_RC.argmax(axis=1), width)
        last_R = np.where(filled_R, width - 1 - across_RC[:, ::-1].argmax(axis=1), -1)
        before = _half_costs(first_R, last_R, margin, side)
        after = _half_costs(first_R[::-1], last_R[::-1], margin, side)[::-1]
        costs = before[:-1] + after[1:]
        positions = np.flatnonzero(costs == costs.min()) + 1
        position = int(positions[np.abs(positions - even).argmin()])
        best = min(best, (float(costs[position - 1]), abs(position - even), axis, position))
    cost, _, axis, position = best
    return cost, axis, position


def _half_costs(
    first_R: NDArray[np.int64], last_R: NDArray[np.int64], margin: float, side: float
) -> NDArray[np.float64]:
    """Return the cost of the bounding box of the first i + 1 rows, for each i.

    `first_R` and `last_R` are the columns of the first and the last cell with tissue. Rows without tissue have a first
    column beyond all cells and the last column -1. The first row has tissue.
    """
    bottom_R = np.maximum.accumulate(np.where(last_R >= 0, np.arange(len(last_R)), 0))
    widths_R = np.maximum.accumulate(last_R) - np.minimum.accumulate(first_R) + 1
    return np.asarray(_cost(bottom_R + 1, widths_R, margin, side))


def _bounds(has_RC: NDArray[np.bool_]) -> Box | None:
    """Return the bounding box of the cells with tissue, or None if there is none."""
    rows, columns = (np.flatnonzero(has_RC.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
