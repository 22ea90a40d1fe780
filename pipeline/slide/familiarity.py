"""Collect the distances of a block's windows in cells of the map.

Shape suffixes: H and W the pixels of a block's box, h and w its cells, r and c rows and columns of windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.familiarity import WINDOW, window_starts
from pipeline.formats.familiarity import CELL_OUT, LIMIT, FamiliarityMap, encoded
from wsi.box import Box
from wsi.grid import Block, Grid

_Span = tuple[int, int]


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
        rows, columns = (
            [((first + start) // m_per_out, (first + min(start + WINDOW, length)) // m_per_out) for start in starts]
            for first, length, starts in (
                (image_m.y, image_m.height, window_starts(image_m.height)),
                (image_m.x, image_m.width, window_starts(image_m.width)),
            )
        )
        self.add(rows, columns, distances_rc)

    def add(self, rows: Sequence[_Span], columns: Sequence[_Span], distances_rc: NDArray[np.floating[Any]]) -> None:
        """Add a window for each pair of a row and a column, with its distance in units of the model's limit.

        A span is the first pixel of the map in a row or column of windows, and the pixel after the last one.
        """
        rows_rh = _weights(rows, self._box_out.y, self._box_out.bottom)
        columns_cw = _weights(columns, self._box_out.x, self._box_out.right)
        # Not a product of matrices, whose rounding depends on the library and the processor.
        self._sums_hw += np.einsum("rh,rw->hw", rows_rh, np.einsum("rc,cw->rw", distances_rc, columns_cw))
        self._weights_hw += np.outer(rows_rh.sum(axis=0), columns_cw.sum(axis=0))

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


def _weights(spans: Sequence[_Span], first: int, last: int) -> NDArray[np.float64]:
    """Return the weights of windows in the cells between `first` and `last`, (windows, cells)."""
    start_n1, stop_n1 = np.array(spans).T[:, :, None]
    left = np.arange(first, last, CELL_OUT)
    overlap_nc = np.minimum(left + CELL_OUT, stop_n1) - np.maximum(left, start_n1)
    half_n1 = (stop_n1 - start_n1) / 2
    from_center_nc = np.abs(left + CELL_OUT / 2 - (start_n1 + half_n1))
    # At least a hundredth: the outermost cells of a slide may have no other window.
    return np.asarray(np.maximum(overlap_nc, 0) * np.maximum(1 - from_center_nc / half_n1, 0.01))


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
