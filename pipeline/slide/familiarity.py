"""Collect the distances of a block's windows in cells of the map.

Shape suffixes: H and W the pixels of a block's box, h and w its cells, r and c rows and columns of windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.familiarity import WINDOW, window_starts
from pipeline.formats.familiarity import CELL_OUT, LIMIT, FamiliarityMap, encoded
from wsi.box import Box
from wsi.grid import Block, Grid


class CellDistances:
    """The mean distance of the windows that overlap each cell of a block.

    The weight of a window falls from its center to its edges, and is proportional to the overlap with the cell.
    """

    def __init__(self, box_out: Box) -> None:
        self._box_out = box_out
        shape_hw = (box_out.height // CELL_OUT, box_out.width // CELL_OUT)
        self._sums_hw, self._weights_hw = np.zeros(shape_hw), np.zeros(shape_hw)

    def add_windows(self, image_m: Box, distances_rc: NDArray[np.float32], m_per_out: int) -> None:
        """Add the windows of an image, in model pixels, as `models.familiarity` lays them."""
        rows, columns = window_starts(image_m.height), window_starts(image_m.width)
        for (row, column), distance in np.ndenumerate(distances_rc):
            window_m = Box(image_m.x + columns[column], image_m.y + rows[row], WINDOW, WINDOW).intersect(image_m)
            self.add(window_m.reduce(m_per_out), float(distance))

    def add(self, window_out: Box, distance: float) -> None:
        """Add a window of the map with its distance, in units of the model's limit."""
        inside = window_out.intersect(self._box_out)
        if not (inside.width and inside.height):
            return
        rows, row_weights = _weights(window_out.y, window_out.bottom, self._box_out.y, self._box_out.bottom)
        columns, column_weights = _weights(window_out.x, window_out.right, self._box_out.x, self._box_out.right)
        weights_hw = np.outer(row_weights, column_weights)
        self._sums_hw[rows, columns] += weights_hw * distance
        self._weights_hw[rows, columns] += weights_hw

    def values(self, tissue_HW: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], int, int]:
        """Return the values of the cells (h, w), the pixels of tissue in cells with a window, and the unfamiliar ones.

        `tissue_HW` is the tissue of the block's box.
        """
        height, width = self._sums_hw.shape
        pixels_hw = tissue_HW.reshape(height, CELL_OUT, width, CELL_OUT).sum(axis=(1, 3))
        pixels_hw = np.where(self._weights_hw > 0, pixels_hw, 0)
        distance_hw = self._sums_hw / np.where(self._weights_hw > 0, self._weights_hw, 1)
        values_hw = encoded(distance_hw, pixels_hw > 0)
        return values_hw, int(pixels_hw.sum()), int(pixels_hw[values_hw > LIMIT].sum())


def _weights(start: int, stop: int, first: int, last: int) -> tuple[slice, NDArray[np.float64]]:
    """Return the cells between `first` and `last` that a window from `start` to `stop` overlaps, and their weights."""
    low, high = max(start, first), min(stop, last)
    cells = np.arange((low - first) // CELL_OUT, -(-(high - first) // CELL_OUT))
    left = first + cells * CELL_OUT
    overlap = np.minimum(left + CELL_OUT, high) - np.maximum(left, low)
    half = (stop - start) / 2
    from_center = np.abs(left + CELL_OUT / 2 - (start + half))
    # At least a hundredth: the outermost cells of a slide may have no other window.
    return slice(int(cells[0]), int(cells[-1]) + 1), overlap * np.maximum(1 - from_center / half, 0.01)


def values_file(folder: Path, block: Block) -> Path:
    """Return the file that keeps the values of a block until those of all blocks are joined."""
    return folder / "familiarity" / f"{block.index:06d}.npy"


def save_values(file: Path, values_hw: NDArray[np.uint8]) -> None:
    """Write the values of a block."""
    file.parent.mkdir(exist_ok=True)
    np.save(file, values_hw)


def join_values(
    folder: Path, grid: Grid, blocks: Iterable[Block], tissue_px: int, unfamiliar_px: int
) -> FamiliarityMap:
    """Return the map of a slide from the saved values of its blocks."""
    width_out, height_out = grid.size_out
    values_hw = np.zeros((-(-height_out // CELL_OUT), -(-width_out // CELL_OUT)), np.uint8)
    for block in blocks:
        box = block.box_out.reduce(CELL_OUT).intersect(Box(0, 0, values_hw.shape[1], values_hw.shape[0]))
        values_hw[box.slices(Box(0, 0, 0, 0))] = np.load(values_file(folder, block))[: box.height, : box.width]
    return FamiliarityMap(values_hw, unfamiliar_px / tissue_px if tissue_px else 0.0)
