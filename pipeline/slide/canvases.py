"""Cover the tissue of a block with canvases: rectangles that pass the networks at once.

The cores of the canvases do not overlap and contain all tissue of the block. Pixels around each core are computed but
not used, so few large canvases compute fewer pixels than many small ones. Each canvas also has a fixed cost. But small
canvases follow the border of the tissue more closely.

Shape suffixes: H and W the map of the block, R rows and C columns of cells.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.backbone_windows import OVERLAP, runs_in_windows
from models.card import ModelCard
from wsi.box import Box
from wsi.grid import Block, Grid

CELL_M = 32
"""Model pixels on which cores start and end: every stride of a network divides them."""

CANVAS_M = 896
"""Largest side of a canvas in model pixels, with its margin, unless the settings request another."""
SHARED_CANVAS_M = 1600
"""The same if the networks share a backbone that runs in windows. They then need much less memory per pixel, because
their largest maps are computed in smaller parts: `models.fine_map` and `models.decoder_parts`."""

PER_CANVAS = 20
"""The fixed cost of a canvas in cells, mostly for kernels that are compiled for its size
(docs/decisions/0017-large-windows.md)."""

LOOK_AHEAD, CANDIDATES, APART = 2, 2, 3
"""How many cuts in a row are tried with several candidates, how many there are, and how many cells lie between them."""


def largest_canvas(card: ModelCard, canvas_m: int | None) -> int:
    """Return the largest side of a canvas for the value of the setting, in model pixels."""
    return canvas_m or (SHARED_CANVAS_M if runs_in_windows(card.segmenter) else CANVAS_M)


def canvas_cores(
    grid: Grid, tissue_HW: NDArray[np.bool_], block: Block, card: ModelCard, canvas_m: int | None = None
) -> list[Box]:
    """Return the cores, in model pixels, of the canvases of a block. `tissue_HW` is the block's `block_tissue`.

    A canvas, which is a core with the model's margin on all sides, has sides of at most `largest_canvas` pixels.
    """
    origin_m = grid.box_m(block.box_out)
    # What is computed around a core, except at the edges of the block.
    around = OVERLAP if runs_in_windows(card.segmenter) else card.margin
    side = (largest_canvas(card, canvas_m) - 2 * card.margin) // CELL_M
    _, found = _cover(_cells(tissue_HW, CELL_M // grid.m_per_out), around / CELL_M, max(1, side))
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


def _cover(has_RC: NDArray[np.bool_], margin: float, side: float, ahead: int = LOOK_AHEAD) -> tuple[float, list[Box]]:
    """Return boxes of cells that contain all cells with tissue, and the cost of their canvases.

    The bounding box is cut as long as that pays. Of the first `ahead` cuts in a row, several candidates are tried.
    """
    box = _bounds(has_RC)
    if box is None:
        return 0.0, []
    rows, columns = box.slices(Box(0, 0, *has_RC.shape[::-1]))
    has_RC = has_RC[rows, columns]
    fits = max(box.height, box.width) <= side
    whole = float(_cost(box.height, box.width, margin, side)) if fits else math.inf
    best, found = whole, [box]
    for estimate, axis, position in _cuts(has_RC, margin, side, CANDIDATES if ahead else 1):
        if estimate >= whole:
            break
        halves = np.split(has_RC, [position], axis)
        (first, before), (second, after) = (_cover(half_RC, margin, side, max(0, ahead - 1)) for half_RC in halves)
        if first + second < best:
            dx, dy = (0, position) if axis == 0 else (position, 0)
            parts = before + [part.shift(dx, dy) for part in after]
            best, found = first + second, [part.shift(box.x, box.y) for part in parts]
    return best, found


def _cost(height: Any, width: Any, margin: float, side: float) -> Any:
    """Return the cost, in cells, of the canvases that a core of this size (numbers or arrays) is cut into.

    The cost is the area of the canvases, plus `PER_CANVAS` for each.
    """
    rows, columns = np.ceil(height / side), np.ceil(width / side)
    return (height + 2 * margin * rows) * (width + 2 * margin * columns) + PER_CANVAS * rows * columns


def _cuts(has_RC: NDArray[np.bool_], margin: float, side: float, most: int) -> list[tuple[float, int, int]]:
    """Return the cost, axis and position of at most `most` cuts, starting with the one that costs least.

    Among cuts of equal cost, the one nearest to even parts comes first. The cuts along an axis lie at least `APART`
    cells from each other. `has_RC` equals its own bounding box.
    """
    found = []
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
        costs, from_even = before[:-1] + after[1:], np.abs(np.arange(1, length) - even)
        chosen: list[int] = []
        for index in np.lexsort((from_even, costs)).tolist():
            if all(abs(index - other) >= APART for other in chosen):
                chosen.append(index)
                if len(chosen) == most:
                    break
        found += [(float(costs[index]), float(from_even[index]), axis, index + 1) for index in chosen]
    return [(cost, axis, position) for cost, _, axis, position in sorted(found)[:most]]


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
