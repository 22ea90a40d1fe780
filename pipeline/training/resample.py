"""Whole images brought from one pixel size to another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsi.levels import MPP_TOLERANCE


def resampled(rgb_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Return an image with both sides times `scale`: reduced by area, as slides are read, or enlarged bicubically.

    Within `MPP_TOLERANCE` of 1 it stays as it is, as slides do.
    """
    if abs(scale - 1) <= MPP_TOLERANCE:
        return rgb_HWC
    height, width = rgb_HWC.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow's box filter is the mean by area; enlarging, it would repeat pixels, which no microscope does.
    filtering = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(rgb_HWC).resize(size, filtering))
