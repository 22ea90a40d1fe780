"""Where the tissue is: a mask from a thumbnail, without glass, pen ink, dust and folds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from wsi.errors import SlideReadError
from wsi.grid import Box
from wsi.resample import area_mean
from wsi.slide import Slide

MASK_MPP = 8.0
"""Micrometres per pixel of the mask, to the nearest whole multiple of a level's pixel."""

STRIP_PX = 8_000_000
"""Pixels of the level that are held at a time while a thumbnail is read."""

MIN_TISSUE_UM2 = 20_000.0
"""Smaller pieces are dust or debris."""

MAX_HOLE_UM2 = 10_000.0
"""Smaller holes (lumina, fat, tears) belong to the tissue around them."""

MIN_FOLD_UM2 = 20_000.0
"""Smaller dark spots are dense tissue, not folds."""

MAX_FOLD_SHARE = 0.2
"""Where more of the tissue than this looks folded, the slide is darkly stained, and nothing is taken for a fold."""

MAX_UNREADABLE_SHARE = 0.01
"""A slide with more of its thumbnail unreadable than this is refused: what is missing could be the tissue."""

# Chroma = max(R, G, B) - min(R, G, B). Glass has about 3, pale eosin about 15; Otsu's threshold is kept in this range
# so that an empty slide does not become tissue and a dark one does not lose its pale parts.
_CHROMA_RANGE = (10.0, 20.0)


@dataclass(frozen=True)
class Tissue:
    """The tissue mask of a slide, over its bounds."""

    mask_HW: NDArray[np.bool_]
    rgb_HWC: NDArray[np.uint8]
    """The thumbnail that the mask was made from."""
    l0_per_px: float
    mpp: float
    fold_um2: float
    warnings: tuple[str, ...]

    @property
    def area_um2(self) -> float:
        """Area of the tissue in square micrometres."""
        return float(self.mask_HW.sum()) * self.mpp**2

    def sample(self, box_out: Box, l0_per_out: float) -> NDArray[np.bool_]:
        """The mask over a box of a map with `l0_per_out` level-0 pixels per pixel, as mask_HW.

        The mask is interpolated between the centres of its pixels, so that a finer map gets smooth borders. Outside
        the slide there is no tissue.
        """
        scale = l0_per_out / self.l0_per_px
        rows, row_weights = _positions(box_out.y, box_out.height, scale)
        columns, column_weights = _positions(box_out.x, box_out.width, scale)
        padded_HW = np.pad(self.mask_HW, 1)
        rows = np.clip(rows + 1, 0, padded_HW.shape[0] - 2)
        columns = np.clip(columns + 1, 0, padded_HW.shape[1] - 2)
        upper, lower = padded_HW[rows], padded_HW[rows + 1]
        left = upper[:, columns] * (1 - row_weights)[:, None] + lower[:, columns] * row_weights[:, None]
        right = upper[:, columns + 1] * (1 - row_weights)[:, None] + lower[:, columns + 1] * row_weights[:, None]
        value = left * (1 - column_weights) + right * column_weights
        inside_HW = _inside(box_out.y, box_out.height, scale, self.mask_HW.shape[0])[:, None] & _inside(
            box_out.x, box_out.width, scale, self.mask_HW.shape[1]
        )
        return np.asarray(value >= 0.5) & inside_HW


def find_tissue(slide: Slide) -> Tissue:
    """Find the tissue of a slide on a thumbnail of about 8 µm per pixel. Deterministic.

    Tissue is what is coloured like H&E: colour against Otsu's threshold on the smoothed chroma (Otsu 1979), which
    leaves out glass, grey dust and black ink; inks whose colours H&E does not have are left out by their hue. Folds are
    left out, too, by saturation minus value (Palokangas et al. 2007), unless the whole slide is dark; their area is
    kept.

    Raises SlideReadError where over 1 % of the thumbnail cannot be read.
    """
    rgb_HWC, l0_per_px, unreadable_share = read_thumbnail(slide, MASK_MPP)
    if unreadable_share > MAX_UNREADABLE_SHARE:
        raise SlideReadError(
            f"{slide.info.path.name}: {unreadable_share:.1%} of the thumbnail cannot be read (at most "
            f"{MAX_UNREADABLE_SHARE:.0%}); copy or scan the slide again"
        )
    mpp = slide.info.mpp * l0_per_px
    smooth_HWC = ndimage.gaussian_filter(rgb_HWC.astype(np.float32), sigma=(0.5, 0.5, 0), mode="nearest")
    mask_HW = _is_stained(smooth_HWC) & ~_is_ink(smooth_HWC)
    mask_HW = _close(mask_HW)
    mask_HW = _without_small(mask_HW, MIN_TISSUE_UM2 / mpp**2)
    mask_HW = ~_without_small(~mask_HW, MAX_HOLE_UM2 / mpp**2)
    fold_HW = _close(mask_HW & _is_folded(smooth_HWC)) & mask_HW
    fold_HW = _without_small(fold_HW, MIN_FOLD_UM2 / mpp**2)
    warnings: tuple[str, ...] = ()
    if fold_HW.sum() > MAX_FOLD_SHARE * mask_HW.sum():
        share = fold_HW.sum() / mask_HW.sum()
        warnings = (f"{share:.0%} of the tissue is as dark as a fold; it was kept as tissue",)
        fold_HW[:] = False
    return Tissue(mask_HW & ~fold_HW, rgb_HWC, l0_per_px, mpp, float(fold_HW.sum()) * mpp**2, warnings)


class Thumbnail(NamedTuple):
    """A slide's bounds, small. What could not be read is white."""

    rgb_HWC: NDArray[np.uint8]
    l0_per_px: float
    unreadable_share: float


def read_thumbnail(slide: Slide, mpp: float) -> Thumbnail:
    """The slide's bounds at about `mpp` micrometres per pixel.

    Read in strips from the coarsest level that is fine enough, so that memory stays small where there is only one.
    """
    info = slide.info
    downsamples = info.level_downsamples
    fine_enough = [i for i, d in enumerate(downsamples) if info.mpp * d <= mpp]
    level = max(fine_enough, key=lambda i: downsamples[i], default=0)
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


def _is_stained(rgb_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    chroma_HW = rgb_HWC.max(axis=2) - rgb_HWC.min(axis=2)
    # Rounded: Otsu's histogram must not depend on the last bit of a float.
    threshold = float(threshold_otsu(np.round(chroma_HW).astype(np.uint8))) if np.ptp(chroma_HW) >= 1 else math.inf
    return np.asarray(chroma_HW > np.clip(threshold, *_CHROMA_RANGE))


def _is_ink(rgb_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    red, green, blue = rgb_HWC[..., 0], rgb_HWC[..., 1], rgb_HWC[..., 2]
    # Haematoxylin and eosin both take more green than red out of the light: blue and green inks do not.
    blue_or_green = green > red + 5
    # Eosin and blood leave more blue than green; red ink takes both away.
    red_ink = (red - np.maximum(green, blue) > 100) & (blue - green < 15)
    return np.asarray(blue_or_green | red_ink)


def _is_folded(rgb_HWC: NDArray[np.float32]) -> NDArray[np.bool_]:
    value_HW = rgb_HWC.max(axis=2)
    saturation_HW = 1 - rgb_HWC.min(axis=2) / np.maximum(value_HW, 1)
    return np.asarray(saturation_HW - value_HW / 255 > 0.1)


def _close(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # Padded: without it the closing would eat the mask along the slide's edge.
    return np.asarray(ndimage.binary_closing(np.pad(mask_HW, 2, mode="edge"), iterations=2)[2:-2, 2:-2])


def _without_small(mask_HW: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    labels_HW, _ = ndimage.label(mask_HW)
    sizes = np.bincount(labels_HW.ravel())
    keep = sizes >= min_px
    keep[0] = False
    return np.asarray(keep[labels_HW])


def _positions(start: int, count: int, scale: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    centres = (np.arange(start, start + count) + 0.5) * scale - 0.5
    whole = np.floor(centres)
    return whole.astype(np.int64), (centres - whole).astype(np.float32)


def _inside(start: int, count: int, scale: float, size: int) -> NDArray[np.bool_]:
    centres = (np.arange(start, start + count) + 0.5) * scale
    return np.asarray((centres >= 0) & (centres < size))
