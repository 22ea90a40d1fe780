"""Find fat: large areas with texture everywhere and few stained strands.

A fat cell is as bright as glass, and its membrane is thinner than a pixel of the thumbnail, so that most of its pixels
have no color. They have texture, which glass does not have. Hair and dust have texture too, but no color around them.

`find_fat` adds fat beside other tissue to the mask. `fat_inside` finds all fat in the finished mask, in which bright
areas are cells and not holes: lumina and tears lie between thick strands of tissue, fat cells between thin ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.masks import Mask, close, grow, pieces, shrink, thick, without_small

MIN_FAT_UM2 = 50_000.0
"""Smaller textured areas are the blur around other objects."""

_MIN_NEAR_COLOR = 0.1
"""Least share of an area that lies beside colored pixels or tissue."""

# In pixels of the halved image, which takes an eighth of the time.
_RIM_PX = 3
"""Distance over which the texture of objects that are not fat reaches."""
_TEXTURE_PX = 2
"""Distance over which texture reaches beyond an object."""
_THICK_PX = 4
"""Fat, with the tissue in it, is at least this thick everywhere."""
_THIN_PX = 2
"""Thinner areas beside tissue are the blur of its border."""
_NEAR_PX = 2
"""Largest distance between fat and a colored strand."""
_STRAND_PX = 1
"""Strands into which a diamond of this radius fits (48 µm) are thick."""
_AROUND_PX = 11
"""Side of the square (176 µm) in which the share of thick strands is measured."""

_MOST_THICK = 0.5
"""Largest share of thick strands in fat."""


def find_fat(textured_HW: Mask, colored_HW: Mask, tissue_HW: Mask, other_HW: Mask, mpp: float) -> Mask:
    """Return the fat outside of the tissue found so far, in a thumbnail with pixels of `mpp` micrometers.

    `colored_HW` has stained and pale pixels. `other_HW` is not fat: pens, borders and black ink.
    """
    tissue_hw, rim_hw = _halved(tissue_HW, 2), grow(_halved(other_HW, 1), _RIM_PX)
    textured_hw = close((_halved(textured_HW, 2) & ~rim_hw) | tissue_hw)
    whole_hw = thick((shrink(textured_hw, _TEXTURE_PX) & ~rim_hw) | tissue_hw, _THICK_PX)
    found = pieces(thick(whole_hw & ~tissue_hw & ~rim_hw, _THIN_PX))
    near_hw = grow(_halved(colored_HW | tissue_HW, 1), _NEAR_PX)
    sizes = found.sizes()
    keep = (sizes >= MIN_FAT_UM2 / (2 * mpp) ** 2) & (found.counts(near_hw) >= _MIN_NEAR_COLOR * sizes)
    height, width = tissue_HW.shape
    fat_HW = found.chosen(keep).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.asarray(fat_HW & ~tissue_HW & ~other_HW)


def fat_inside(colored_HW: Mask, mask_HW: Mask, mpp: float) -> Mask:
    """Return the parts of the tissue mask that are fat, in a thumbnail with pixels of `mpp` micrometers.

    In fat, at most `_MOST_THICK` of the mask around a pixel belongs to thick strands of stained or pale pixels. Thin
    wisps of tissue and pieces below `MIN_FAT_UM2` do not count. `colored_HW` has stained and pale pixels.
    """
    mask_hw = _halved(mask_HW, 2)
    strands_hw = thick(_halved(colored_HW, 3) & mask_hw, _STRAND_PX)
    fat_hw = thick(mask_hw, _THIN_PX) & (_around(strands_hw) <= _MOST_THICK * _around(mask_hw))
    fat_hw = without_small(fat_hw, MIN_FAT_UM2 / (2 * mpp) ** 2)
    height, width = mask_HW.shape
    return np.asarray(fat_hw.repeat(2, axis=0).repeat(2, axis=1)[:height, :width] & mask_HW)


def _around(mask_hw: Mask) -> NDArray[np.float32]:
    """Return the share of the square around each pixel that is in a mask."""
    return np.asarray(ndimage.uniform_filter(mask_hw.astype(np.float32), _AROUND_PX, mode="constant"))


def _halved(mask_HW: Mask, least: int) -> Mask:
    """Return a mask at half the size: pixels of which at least `least` of four are set."""
    height, width = mask_HW.shape
    even_HW = np.pad(mask_HW, ((0, height % 2), (0, width % 2)), mode="edge").view(np.uint8)
    return np.asarray(even_HW[::2, ::2] + even_HW[1::2, ::2] + even_HW[::2, 1::2] + even_HW[1::2, 1::2] >= least)
