"""Draw the border of the tissue at the resolution of a map.

The tissue mask, with pixels of about 8 µm, decides what is tissue. Inside it, pixels of the map that are as bright as
the slide's glass are taken out: at its border, and in lumina, tears and other gaps. Clearly stained pixels beside it
are added, by at most `RIM_UM`. Fat keeps its cells, which are as bright as glass (`wsi.fat`).

A pixel depends only on pixels within `reach_px`, so a part of a slide gives that part of the whole slide's border.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box
from wsi.masks import Mask, grow, one_px_larger, thick
from wsi.stain import bare_and_stained
from wsi.tissue import Tissue

RIM_UM = 4.0
"""Largest distance of tissue from the mask, or one map pixel if that is more: half a pixel of the mask, within which
its border is not known."""

GAP_UM = 8.0
"""A gap contains a diamond of this radius. Smaller ones belong to the tissue around them."""


def rim_px(mpp: float) -> int:
    """Return `RIM_UM` in pixels of `mpp` micrometers, at least 1."""
    return max(1, round(RIM_UM / mpp))


def reach_px(mpp: float) -> int:
    """Return the distance, in pixels of `mpp` micrometers, up to which pixels decide whether a pixel is tissue."""
    return 3 * _gap_px(mpp) + rim_px(mpp)


def possible_tissue(tissue: Tissue, box_out: Box, l0_per_out: float, mpp: float) -> Mask:
    """Return the pixels of a map in a box that `fine_tissue` may return: the mask and its rim."""
    rim = rim_px(mpp)
    outer = Box(box_out.x - rim, box_out.y - rim, box_out.width + 2 * rim, box_out.height + 2 * rim)
    possible_HW = tissue.sample(outer, l0_per_out)
    if possible_HW.any() and not possible_HW.all():
        for _ in range(rim):
            possible_HW = one_px_larger(possible_HW)
    return np.asarray(possible_HW[box_out.slices(outer)])


def fine_tissue(tissue: Tissue, rgb_HWC: NDArray[np.uint8], box_out: Box, l0_per_out: float, mpp: float) -> Mask:
    """Return the tissue in a box of a map with pixels of `mpp` micrometers, as mask_HW.

    `rgb_HWC` has the colors of the map's pixels in the box. The result is exact for pixels that lie `reach_px` or more
    inside the box.
    """
    mask_HW = tissue.sample(box_out, l0_per_out)
    if not mask_HW.any():
        return mask_HW
    bare_HW, stained_HW = bare_and_stained(rgb_HWC, tissue.glass)
    gap_HW = thick(bare_HW, _gap_px(mpp))
    # Opening rounds the corners of a gap off. They come back, but not the cracks that lead to it.
    gap_HW = grow(gap_HW, _gap_px(mpp)) & bare_HW
    fine_HW = mask_HW & (~gap_HW | tissue.nearest(tissue.fat_HW, box_out, l0_per_out))
    addable_HW = stained_HW & (tissue.nearest(tissue.left_out_HW, box_out, l0_per_out) == 0) & ~mask_HW
    for _ in range(rim_px(mpp)):
        fine_HW |= one_px_larger(fine_HW) & addable_HW
    return np.asarray(fine_HW)


def _gap_px(mpp: float) -> int:
    return max(1, round(GAP_UM / mpp))
