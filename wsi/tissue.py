"""Find the tissue: a mask from a thumbnail, without glass, pen ink, dust and folds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from wsi.box import Box
from wsi.errors import SlideReadError
from wsi.levels import pick_level
from wsi.resample import area_mean
from wsi.slide import Slide

MASK_MPP = 8.0
"""Micrometers per pixel of the mask, rounded to a whole multiple of a level's pixel."""

STRIP_PX = 8_000_000
"""Pixels of the level that are in memory at a time while a thumbnail is read."""

WORK_PX = 1 << 19
"""Pixels of the thumbnail that are processed at a time in steps that need more than a few bytes per pixel."""

MIN_TISSUE_UM2 = 20_000.0
"""Smaller pieces are dust or debris."""

MAX_HOLE_UM2 = 10_000.0
"""Smaller holes (lumina, fat, tears) belong to the tissue around them."""

MIN_FOLD_UM2 = 20_000.0
"""Smaller dark spots are dense tissue, not folds."""

MAX_FOLD_SHARE = 0.2
"""If a larger share of the tissue looks folded, the slide is darkly stained, and no fold is removed."""

MAX_UNREADABLE_SHARE = 0.01
"""A slide is refused if a larger share of its thumbnail is unreadable, because the missing part could be the tissue."""

# Chroma = max(R, G, B) - min(R, G, B). Glass has about 3, pale eosin about 15. Otsu's threshold is clipped to this
# range, so that an empty slide does not become tissue and a dark slide does not lose its pale parts.
_CHROMA_RANGE = (10.0, 20.0)

_SMOOTH_REACH = 2
"""Rows around a pixel on which its smoothed color depends."""

_CLOSE_REACH = 4
"""Rows around a pixel on which the closed mask depends: two steps out, two back."""


@dataclass(frozen=True)
class Tissue:
    """The tissue mask of a slide, over its bounds."""

    mask_HW: NDArray[np.bool_]
    l0_per_px: float
    mpp: float
    fold_um2: float
    warnings: tuple[str, ...]

    @property
    def area_um2(self) -> float:
        """Return the area of the tissue in square micrometers."""
        return float(self.mask_HW.sum()) * self.mpp**2

    def sample(self, box_out: Box, l0_per_out: float) -> NDArray[np.bool_]:
        """Return the mask over a box of a map with `l0_per_out` level-0 pixels per pixel, as mask_HW.

        The mask is interpolated between the centers of its pixels, so that a finer map has smooth borders. Pixels
        outside the slide are not tissue.
        """
        scale = l0_per_out / self.l0_per_px
        height, width = self.mask_HW.shape
        inside_H = _inside(box_out.y, box_out.height, scale, height)
        inside_HW = inside_H[:, None] & _inside(box_out.x, box_out.width, scale, width)
        rows, row_weights = _positions(box_out.y, box_out.height, scale, height)
        columns, column_weights = _positions(box_out.x, box_out.width, scale, width)
        part_HW = self._around(rows, columns)
        if part_HW.all() or not part_HW.any():
            return np.asarray(inside_HW & part_HW[0, 0])
        upper, lower = part_HW[rows - rows[0]], part_HW[rows - rows[0] + 1]
        columns = columns - columns[0]
        left = upper[:, columns] * (1 - row_weights)[:, None] + lower[:, columns] * row_weights[:, None]
        right = upper[:, columns + 1] * (1 - row_weights)[:, None] + lower[:, columns + 1] * row_weights[:, None]
        value = left * (1 - column_weights) + right * column_weights
        return np.asarray(value >= 0.5) & inside_HW

    def _around(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the mask from the first to one past the last of these rows and columns; outside it is False."""
        top, bottom, left, right = rows[0], rows[-1] + 2, columns[0], columns[-1] + 2
        part_HW = np.zeros((bottom - top, right - left), bool)
        inner_HW = self.mask_HW[max(0, top) : bottom, max(0, left) : right]
        y, x = max(0, -top), max(0, -left)
        part_HW[y : y + inner_HW.shape[0], x : x + inner_HW.shape[1]] = inner_HW
        return part_HW


def find_tissue(slide: Slide) -> Tissue:
    """Find the tissue of a slide on a thumbnail of about 8 µm per pixel. Deterministic.

    Pixels with the colors of H&E are tissue. Otsu's threshold on the smoothed chroma (Otsu 1979) removes glass, gray
    dust and black ink. The hue removes inks whose colors H&E does not have. Saturation minus value removes folds
    (Palokangas et al. 2007), unless the whole slide is dark; the area of the folds is returned.

    Raises SlideReadError if more than `MAX_UNREADABLE_SHARE` of the thumbnail cannot be read.
    """
    rgb_HWC, l0_per_px, unreadable_share = read_thumbnail(slide, MASK_MPP)
    if unreadable_share > MAX_UNREADABLE_SHARE:
        raise SlideReadError(
            f"{slide.info.path.name}: {unreadable_share:.1%} of the thumbnail cannot be read (at most "
            f"{MAX_UNREADABLE_SHARE:.0%}); copy or scan the slide again"
        )
    mpp = slide.info.mpp * l0_per_px
    stained_HW, folded_HW = _stained_and_folded(rgb_HWC)
    mask_HW = _close(stained_HW)
    mask_HW = _without_small(mask_HW, MIN_TISSUE_UM2 / mpp**2)
    mask_HW = ~_without_small(~mask_HW, MAX_HOLE_UM2 / mpp**2)
    fold_HW = _close(mask_HW & folded_HW) & mask_HW
    fold_HW = _without_small(fold_HW, MIN_FOLD_UM2 / mpp**2)
    warnings: tuple[str, ...] = ()
    if fold_HW.sum() > MAX_FOLD_SHARE * mask_HW.sum():
        share = fold_HW.sum() / mask_HW.sum()
        warnings = (f"{share:.0%} of the tissue is as dark as a fold and was kept as tissue",)
        fold_HW[:] = False
    return Tissue(mask_HW & ~fold_HW, l0_per_px, mpp, float(fold_HW.sum()) * mpp**2, warnings)


class Thumbnail(NamedTuple):
    """A small image of a slide's bounds. Parts that could not be read are white."""

    rgb_HWC: NDArray[np.uint8]
    l0_per_px: float
    unreadable_share: float


def read_thumbnail(slide: Slide, mpp: float) -> Thumbnail:
    """Return the slide's bounds at about `mpp` micrometers per pixel.

    The level is that of `pick_level`. It is read in strips, so that memory stays small for a slide with one level.
    """
    info = slide.info
    downsamples = info.level_downsamples
    level = pick_level(downsamples, mpp / info.mpp)
    downsample = downsamples[level]
    factor = max(1, round(mpp / (info.mpp * downsample)))
    bounds = info.bounds_l0
    x, y = round(bounds.x / downsample), round(bounds.y / downsample)
    width, height = (math.ceil(length / downsample / factor) for length in (bounds.width, bounds.height))
    rgb_HWC = np.empty((height, width, 3), np.uint8)
    unreadable_px = 0
    rows = max(1, STRIP_PX // (width * factor**2))
    for top in range(0, height, rows):
        count = min(rows, height - top)
        pixels = slide.read(level, Box(x, y + top * factor, width * factor, count * factor))
        unreadable_px += sum(box.width * box.height for box in pixels.unreadable_lv)
        rgb_HWC[top : top + count] = area_mean(pixels.rgb_HWC, (0, 0), Box(0, 0, width, count), factor)
    return Thumbnail(rgb_HWC, downsample * factor, unreadable_px / (width * height * factor**2))


def _stained_and_folded(rgb_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return two masks of the smoothed thumbnail: the colors of tissue, and the dark and saturated colors of folds."""
    shape = rgb_HWC.shape[:2]
    chroma_HW, ink_HW, folded_HW = np.empty(shape, np.uint8), np.empty(shape, bool), np.empty(shape, bool)
    counts = np.zeros(256, np.int64)
    ranges = []
    for rows in _strips(shape):
        smooth_HWC = _smooth(rgb_HWC, rows)
        largest_HW = _over_channels(np.maximum, smooth_HWC)
        smallest_HW = _over_channels(np.minimum, smooth_HWC)
        spread_HW = largest_HW - smallest_HW
        ranges.append((spread_HW.min(), spread_HW.max()))
        # Rounded, so that Otsu's histogram does not depend on the last bit of a float.
        counts += np.bincount(np.round(spread_HW).astype(np.uint8).ravel(), minlength=256)
        # Rounded up to a byte, which does not change a comparison with a whole number, as every threshold is.
        chroma_HW[rows] = np.ceil(spread_HW)
        ink_HW[rows] = _is_ink(smooth_HWC)
        folded_HW[rows] = _is_folded(largest_HW, smallest_HW)
    has_color = max(high for _, high in ranges) - min(low for low, _ in ranges) >= 1
    threshold = np.clip(_otsu(counts) if has_color else math.inf, *_CHROMA_RANGE)
    return (chroma_HW > threshold) & ~ink_HW, folded_HW


def _strips(shape: tuple[int, ...]) -> list[slice]:
    """Return the rows of an image in strips of about `WORK_PX` pixels."""
    rows = max(1, WORK_PX // shape[1])
    return [slice(top, min(top + rows, shape[0])) for top in range(0, shape[0], rows)]


def _smooth(rgb_HWC: NDArray[np.uint8], rows: slice) -> NDArray[np.float32]:
    """Return some rows of the smoothed image, equal to those of the whole image."""
    top = max(0, rows.start - _SMOOTH_REACH)
    part_HWC = rgb_HWC[top : rows.stop + _SMOOTH_REACH].astype(np.float32)
    smooth_HWC = ndimage.gaussian_filter(
        part_HWC, sigma=(0.5, 0.5, 0), radius=(_SMOOTH_REACH, _SMOOTH_REACH, 0), mode="nearest"
    )
    return np.asarray(smooth_HWC[rows.start - top :][: rows.stop - rows.start])


def _over_channels(choose: np.ufunc, rgb_HWC: NDArray[np.float32]) -> NDArray[np.float32]:
    # Channel by channel: a tenth of the time of max(axis=2) and min(axis=2).
    return np.asarray(choose(choose(rgb_HWC[..., 0], rgb_HWC[..., 1]), rgb_HWC[..., 2]))


def _otsu(counts: NDArray[np.int64]) -> float:
    """Return Otsu's threshold of values from 0 to 255, given how often each occurs."""
    values = np.flatnonzero(counts)
    return float(threshold_otsu(hist=(counts, np.arange(256))) if len(values) > 1 else values[0])


def _is_ink(rgb_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    red, green, blue = rgb_HWC[..., 0], rgb_HWC[..., 1], rgb_HWC[..., 2]
    # Hematoxylin and eosin both absorb more green than red. Blue and green inks do not.
    blue_or_green = green > red + 5
    # Eosin and blood leave more blue than green. Red ink absorbs both.
    red_ink = (red - np.maximum(green, blue) > 100) & (blue - green < 15)
    return np.asarray(blue_or_green | red_ink)


def _is_folded(value_HW: NDArray[np.float32], smallest_HW: NDArray[np.float32]) -> NDArray[np.bool_]:
    saturation_HW = 1 - smallest_HW / np.maximum(value_HW, 1)
    return np.asarray(saturation_HW - value_HW / 255 > 0.1)


def _close(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    height = mask_HW.shape[0]
    closed_HW = np.empty_like(mask_HW)
    for rows in _strips(mask_HW.shape):
        top, bottom = max(0, rows.start - _CLOSE_REACH), min(height, rows.stop + _CLOSE_REACH)
        # Without padding the closing would erode the mask along the slide's edge.
        above, below = 2 * (top == 0), 2 * (bottom == height)
        part_HW = np.pad(mask_HW[top:bottom], ((above, below), (2, 2)), mode="edge")
        part_HW = ndimage.binary_closing(part_HW, iterations=2)
        closed_HW[rows] = part_HW[above + rows.start - top :][: rows.stop - rows.start, 2:-2]
    return closed_HW


def _without_small(mask_HW: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    labels_HW, count = ndimage.label(mask_HW)
    sizes = np.zeros(count + 1, np.int64)
    # In strips, because counting and indexing make copies of eight bytes per pixel.
    for rows in _strips(mask_HW.shape):
        sizes += np.bincount(labels_HW[rows].ravel(), minlength=count + 1)
    keep = sizes >= min_px
    keep[0] = False
    kept_HW = np.empty_like(mask_HW)
    for rows in _strips(mask_HW.shape):
        kept_HW[rows] = keep[labels_HW[rows]]
    return kept_HW


def _positions(start: int, count: int, scale: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the mask's pixel before the center of each map pixel, from -1 to size - 1, and the distance from it."""
    centers = (np.arange(start, start + count) + 0.5) * scale - 0.5
    whole = np.floor(centers)
    return np.clip(whole.astype(np.int64), -1, size - 1), (centers - whole).astype(np.float32)


def _inside(start: int, count: int, scale: float, size: int) -> NDArray[np.bool_]:
    centers = (np.arange(start, start + count) + 0.5) * scale
    return np.asarray((centers >= 0) & (centers < size))
