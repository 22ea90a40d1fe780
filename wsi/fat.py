"""Find fat: large areas with texture everywhere and few stained strands.

A fat cell is as bright as glass, and its membrane is thinner than a pixel of the thumbnail, so that most of its pixels
have no color. They have texture, which glass does not have. Hair and dust have texture too, but no color around them.
"""

from __future__ import annotations

import numpy as np

from wsi.masks import Mask, close, grow, pieces, shrink, thick

MIN_FAT_UM2 = 50_000.0
"""Smaller textured areas are the blur around other objects."""

_MIN_NEAR_COLOR = 0.1
"""Least share of an area that lies beside colored pixels or tissue."""

# In pixels of the halved image, which takes an eighth of the time.
_RIM_PX = 3
"""Distance over which the texture of pens and borders reaches."""
_TEXTURE_PX = 2
"""Distance over which texture reaches beyond an object."""
_THICK_PX = 4
"""Fat, with the tissue in it, is at least this thick everywhere."""
_THIN_PX = 2
"""Thinner areas beside tissue are the blur of its border."""
_NEAR_PX = 2
"""Largest distance between fat and a colored strand."""


def find_fat(textured_HW: Mask, colored_HW: Mask, tissue_HW: Mask, other_HW: Mask, mpp: float) -> Mask:
    """Return the fat outside of the tissue found so far, in a thumbnail with pixels of `mpp` micrometers.

    `colored_HW` has stained and pale pixels. `other_HW` is never tissue: pens and borders.
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


def _halved(mask_HW: Mask, least: int) -> Mask:
    """Return a mask at half the size: pixels of which at least `least` of four are set."""
    height, width = mask_HW.shape
    even_HW = np.pad(mask_HW, ((0, height % 2), (0, width % 2)), mode="edge").view(np.uint8)
    return np.asarray(even_HW[::2, ::2] + even_HW[1::2, ::2] + even_HW[::2, 1::2] + even_HW[1::2, 1::2] >= least)
