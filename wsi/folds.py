"""Find folds: tissue in two layers.

A fold has about twice the density of the tissue around it in the same color, sharp borders, and a long shape. Dense
tissue differs in at least one of these: epidermis and lymphoid tissue have another color than their surroundings,
dense areas without sharp borders are compact, and on a dark slide everything is dark.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.masks import Mask, close, grow, patches, pieces, wider
from wsi.stain import densities

MIN_FOLD_UM2 = 10_000.0
"""Smaller dark spots are dense tissue."""

_CELL_UM = 256.0
"""Side of the cells in which the density of the tissue is averaged."""
_CELLS_AROUND = 7
"""Side of the window of cells that are the surroundings of a pixel."""
_RATIO = 1.6
"""Least density of a fold relative to its surroundings."""
_MIN_DENSITY = 0.4
"""Least mean density of a fold: two layers of any stain are dark."""
_RED_SHARE = (0.75, 1.1)
"""Range of the red density relative to the green one, in a fold relative to its surroundings. Hematoxylin raises it, so
dense cells lie above the range. Blood lies below."""
_RED_SHARE_OF_PIXEL = (0.6, 1.25)
"""The same for a single pixel, which separates a fold from dense cells beside it."""
_MIN_STEP = 1.3
"""Least ratio of the densities inside a fold and just outside its border."""
_RIM_PX = 5
_MAX_FILL = 0.35
"""Largest area of a fold relative to the square on its longest extent: folds are long."""

_Glass = tuple[float, float, float]


def find_folds(rgb_HWC: NDArray[np.uint8], tissue_HW: Mask, glass: _Glass, mpp: float) -> Mask:
    """Return the folds in the tissue of a thumbnail with pixels of `mpp` micrometers."""
    cell = max(1, round(_CELL_UM / mpp))
    around_hwC = _surroundings(rgb_HWC, tissue_HW, glass, cell)
    least_hw = _RATIO * around_hwC.mean(axis=2)
    dark_HW = np.zeros_like(tissue_HW)
    for rows, columns in patches(tissue_HW):
        part = densities(rgb_HWC, rows, columns, glass)
        rows_h, columns_w = (np.arange(one.start, one.stop) // cell for one in (rows, columns))
        mean_HW = part.mean_HW
        here_HW = tissue_HW[rows, columns] & (mean_HW > _MIN_DENSITY) & (mean_HW > least_hw[rows_h][:, columns_w])
        y_N, x_N = np.nonzero(here_HW)
        share_N = _red_share(part.od_CHW[:, y_N, x_N], around_hwC[rows_h[y_N], columns_w[x_N]].T)
        here_HW[y_N, x_N] = _is_between(share_N, _RED_SHARE_OF_PIXEL)
        dark_HW[rows, columns] = here_HW
    found = pieces(close(dark_HW) & tissue_HW)
    keep = found.sizes() >= MIN_FOLD_UM2 / mpp**2
    for label, place in enumerate(ndimage.find_objects(found.labels_HW), start=1):
        if keep[label]:
            keep[label] = _is_fold(
                rgb_HWC, tissue_HW, glass, around_hwC[_middle(place, cell)], found.labels_HW, label, place
            )
    return found.chosen(keep)


def _middle(place: tuple[slice, slice], cell: int) -> tuple[int, int]:
    """Return the row and column of the cell in the middle of a piece."""
    rows, columns = place
    return (rows.start + rows.stop) // 2 // cell, (columns.start + columns.stop) // 2 // cell


def _surroundings(rgb_HWC: NDArray[np.uint8], tissue_HW: Mask, glass: _Glass, cell: int) -> NDArray[np.float64]:
    """Return the densities of the tissue around each cell, as around_hwC; 0 without tissue.

    Each pixel weighs as much as its density, so that fat and lumina around dense tissue do not make it a fold.
    """
    height, width = tissue_HW.shape
    counts_hw = np.zeros((-(-height // cell), -(-width // cell)))
    sums_hwC = np.zeros((*counts_hw.shape, 3))
    for rows, columns in patches(tissue_HW):
        part = densities(rgb_HWC, rows, columns, glass)
        # Whole numbers, so that the sums do not depend on the patches.
        weight_HW = np.round(part.mean_HW.astype(np.float64) * 1e3) * tissue_HW[rows, columns]
        _add_cells(counts_hw, weight_HW, rows, columns, cell)
        for c in range(3):
            od_HW = np.round(part.od_CHW[c].astype(np.float64) * 1e4)
            _add_cells(sums_hwC[..., c], od_HW * weight_HW, rows, columns, cell)
    window = np.ones((_CELLS_AROUND, _CELLS_AROUND))
    counts_hw = ndimage.correlate(counts_hw, window, mode="constant")
    for c in range(3):
        sums_hwC[..., c] = ndimage.correlate(sums_hwC[..., c], window, mode="constant")
    return np.asarray(sums_hwC / np.maximum(counts_hw, 1)[..., None] / 1e4)


def _add_cells(
    sums_hw: NDArray[np.float64], values_HW: NDArray[np.float64], rows: slice, columns: slice, cell: int
) -> None:
    """Add the values of some rows and columns to the sums of their cells."""
    for axis, part in enumerate((rows, columns)):
        starts = [max(0, start - part.start) for start in range(part.start // cell * cell, part.stop, cell)]
        values_HW = np.add.reduceat(values_HW, starts, axis=axis)
    y, x = rows.start // cell, columns.start // cell
    sums_hw[y : y + values_HW.shape[0], x : x + values_HW.shape[1]] += values_HW


def _red_share(od_C: NDArray[np.floating], around_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the red density relative to the green one, divided by that of the surroundings; channels come first."""
    return np.asarray(od_C[0] * around_C[1] / np.maximum(od_C[1] * around_C[0], 1e-6))


def _is_between(values: NDArray[np.float64], bounds: tuple[float, float]) -> NDArray[np.bool_]:
    return np.asarray((values > bounds[0]) & (values < bounds[1]))


def _is_fold(
    rgb_HWC: NDArray[np.uint8],
    tissue_HW: Mask,
    glass: _Glass,
    around_C: NDArray[np.float64],
    labels_HW: NDArray[np.int32],
    label: int,
    place: tuple[slice, slice],
) -> bool:
    """Return whether a dark piece is long, has sharp borders, and has the color of its surroundings `around_C`."""
    rows, columns = (wider(part, _RIM_PX, length) for part, length in zip(place, labels_HW.shape, strict=True))
    inside_HW = labels_HW[rows, columns] == label
    extent_px = math.hypot(*(part.stop - part.start for part in place))
    if inside_HW.sum() > _MAX_FILL * extent_px**2:
        return False
    part = densities(rgb_HWC[:, columns], rows, slice(0, inside_HW.shape[1]), glass)
    od_NC = np.ascontiguousarray(part.od_CHW[:, inside_HW].T)
    od_C = od_NC.mean(axis=0, dtype=np.float64)
    if not _is_between(_red_share(od_C, around_C), _RED_SHARE):
        return False
    mean_HW = part.mean_HW
    near_HW, touching_HW = grow(inside_HW, _RIM_PX), grow(inside_HW, 2)
    outside_HW = near_HW & ~touching_HW & tissue_HW[rows, columns]
    if not outside_HW.any():
        return False
    inner = float(mean_HW[inside_HW].mean(dtype=np.float64))
    outer = float(mean_HW[outside_HW].mean(dtype=np.float64))
    return inner > _MIN_STEP * outer
