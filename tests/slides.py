"""Small slides that the tests write themselves. They are lossless, so both readers return the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

TILE = 128
"""Side of a written slide's TIFF tiles."""

PINK, PURPLE, GLASS = (214, 130, 180), (110, 60, 140), (244, 243, 244)
"""Colors of eosin, hematoxylin and the slide's glass."""


def write_slide(
    path: Path,
    rgb_HWC: NDArray[np.uint8],
    *,
    mpp: float | None = 0.5,
    power: float | None = None,
    levels: Sequence[int] = (1,),
    resolution_mpp: float | None = None,
) -> Path:
    """Write an image as an Aperio slide with levels at the given whole downsamples. Return the path.

    `mpp` and `power` go into the Aperio description, `resolution_mpp` into the TIFF resolution tags.
    """
    facts = [f"MPP = {mpp}"] * (mpp is not None) + [f"AppMag = {power}"] * (power is not None)
    description = "|".join(["Aperio Image Library v11.2.1 \r\n" + "x".join(map(str, rgb_HWC.shape[1::-1])), *facts])
    per_cm = None if resolution_mpp is None else (1e4 / resolution_mpp, 1e4 / resolution_mpp)
    with tifffile.TiffWriter(path) as tiff:
        for number, downsample in enumerate(levels):
            if number == 1:  # Aperio's second image is a thumbnail in strips
                tiff.write(reduce(rgb_HWC, 16), photometric="rgb", description=description, metadata=None)
            tiff.write(
                reduce(rgb_HWC, downsample),
                tile=(TILE, TILE),
                photometric="rgb",
                compression="adobe_deflate",
                description=description,
                metadata=None,
                resolution=per_cm,
                resolutionunit=None if per_cm is None else "CENTIMETER",
            )
    return path


def reduce(rgb_HWC: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Return the image reduced by a whole factor: means of factor × factor pixels, rounded half up. Slow and simple."""
    height, width = rgb_HWC.shape[0] // factor, rgb_HWC.shape[1] // factor
    blocks = rgb_HWC[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    means: NDArray[np.float64] = np.floor(blocks.mean(axis=(1, 3)) + 0.5)
    return means.astype(np.uint8)


def painted(
    size: tuple[int, int], *shapes: tuple[tuple[int, int, int, int], tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """Return an image of glass, (width, height) in pixels, with filled boxes (x, y, width, height) of a color."""
    rgb_HWC = np.empty((size[1], size[0], 3), np.uint8)
    rgb_HWC[:] = GLASS
    for (x, y, width, height), color in shapes:
        rgb_HWC[y : y + height, x : x + width] = color
    return rgb_HWC


def small_slide(path: Path) -> Path:
    """Write a slide of 300×250 pixels of 1 µm with one pink box on it. Return the path."""
    return write_slide(path, painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=1.0)
