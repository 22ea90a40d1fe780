"""Find pen ink: pieces in a color of pens that are smooth, or that have the same density everywhere.

Some stains have the same colors. Stained tissue has texture, and its density differs from place to place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.masks import Mask, Pieces, close, grow, pieces, shrink, strips
from wsi.stain import Look, densities, has_look

MIN_PEN_UM2 = 5_000.0
"""Smaller spots in a color of pens belong to what is around them."""

_SMOOTH_SHARE = 0.4
"""Least share of smooth pixels in a piece of pen ink."""
_RIM_PX = 2
"""Width of the blur around pens, in which they have the colors of stains."""

_EDGE_PX = 3
"""Width of the edge of a stroke, whose density is lower."""
_GRAIN_SIGMA, _GRAIN_REACH = 2.0, 6
"""Deviation and reach of the Gaussian that removes the grain of a pen."""
_MAX_SPREAD = 0.03
"""Largest spread of the density in a piece of pen ink, without grain and edge, relative to its mean. Grain of 10 %
leaves 0.02; stained tissue has 0.07 to 0.4."""
_MIN_INNER_UM2 = 20_000.0
"""Smaller parts without their edge show too little of the spread."""

_Glass = tuple[float, float, float]


def find_pens(rgb_HWC: NDArray[np.uint8], looks_HW: NDArray[np.uint8], glass: _Glass, mpp: float) -> Mask:
    """Return the pen ink in a thumbnail with pixels of `mpp` micrometers, with the blur around it."""
    ink_HW = has_look(looks_HW, Look.INK)
    found = pieces(ink_HW)
    sizes = found.sizes()
    large = sizes >= MIN_PEN_UM2 / mpp**2
    if not large[1:].any():
        return np.zeros_like(ink_HW)
    is_pen = large & (found.counts(has_look(looks_HW, Look.SMOOTH)) >= _SMOOTH_SHARE * sizes)
    if (large & ~is_pen)[1:].any():
        inner_HW = shrink(close(ink_HW), _EDGE_PX) & ink_HW
        is_pen |= large & _is_even(rgb_HWC, glass, found, inner_HW, _MIN_INNER_UM2 / mpp**2)
    pen_HW = found.chosen(is_pen)
    return pen_HW | (grow(pen_HW, _RIM_PX) & has_look(looks_HW, Look.STAINED | Look.PALE))


def _is_even(
    rgb_HWC: NDArray[np.uint8], glass: _Glass, found: Pieces, inner_HW: Mask, min_px: float
) -> NDArray[np.bool_]:
    """Return for each label whether the density is the same everywhere in the inner part of the piece."""
    counts, sums, squares = np.zeros((3, found.number + 1))
    columns = slice(0, inner_HW.shape[1])
    for rows in strips(inner_HW.shape):
        top = max(0, rows.start - _GRAIN_REACH)
        weight_HW = inner_HW[top : rows.stop + _GRAIN_REACH].astype(np.float32)
        density_HW = _blurred(densities(rgb_HWC, rows, columns, glass, _GRAIN_REACH).mean_HW * weight_HW)
        density_HW /= np.maximum(_blurred(weight_HW), 1e-6)
        here_HW = inner_HW[rows]
        labels_N = found.labels_HW[rows][here_HW]
        # Whole numbers, so that the sums do not depend on the strips.
        density_N = np.round(density_HW[rows.start - top :][: here_HW.shape[0]][here_HW].astype(np.float64) * 1e4)
        counts += np.bincount(labels_N, minlength=found.number + 1)
        sums += np.bincount(labels_N, density_N, found.number + 1)
        squares += np.bincount(labels_N, density_N**2, found.number + 1)
    means = sums / np.maximum(counts, 1)
    spreads = np.sqrt(np.maximum(0, squares / np.maximum(counts, 1) - means**2))
    return np.asarray((counts >= min_px) & (spreads <= _MAX_SPREAD * means))


def _blurred(values_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(ndimage.gaussian_filter(values_HW, _GRAIN_SIGMA, radius=_GRAIN_REACH, mode="nearest"))
