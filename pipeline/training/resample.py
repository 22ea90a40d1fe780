"""Resampling of whole images to another pixel size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsi.levels import MPP_TOLERANCE


def resampled(rgb_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Return an image with both sides multiplied by `scale`.

    Images are reduced by area averaging, like slides, and enlarged bicubically. An image whose scale is within
    `MPP_TOLERANCE` of 1 is returned unchanged, like a slide.
    """
    if abs(scale - 1) <= MPP_TOLERANCE:
        return rgb_HWC
    height, width = rgb_HWC.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow's box filter is the area mean. It would repeat pixels when enlarging, which looks unlike a microscope.
    filtering = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(rgb_HWC).resize(size, filtering))
