"""Compare the pixels of a slide in tiffslide, the faster library, with those in OpenSlide."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.box import Box
from wsi.readers import Reader, TiffSlideReader
from wsi.tiff_tiles import TiledImage

VENDORS = frozenset({"aperio", "generic-tiff"})
"""Formats of OpenSlide whose levels are plain TIFF images, without gaps, overlaps, bounds or several regions."""

MOST_DIFFERENCE = 2
"""Largest difference, of 255, in any channel of any pixel. Both libraries decode JPEG with libjpeg-turbo and JPEG 2000
with OpenJPEG, and returned the same level-0 pixels for all slides at hand. Other builds may round a color conversion
differently, by 1 in each of two steps. A wrong color space, a shift or a wrong tile differ by tens."""

PROBE_PX = 256
"""Longest side of the part of a tile that is compared."""


def tiffslide_agrees(path: Path, other: Reader) -> bool:
    """Return whether tiffslide can replace OpenSlide, whose reader of the same file is `other`.

    All of these must hold: the slide comes from one of `VENDORS` and states no bounds; both libraries have the same
    level sizes; every level is one whole TIFF image of 8-bit RGB tiles; and on each level two tiles are the same, the
    one with the most bytes, which has the most detail, and the middle one. A tile for which `TiledImage.has_damage` is
    true is replaced by the next one, because OpenSlide would read it without an error. Raises the errors of the
    libraries.
    """
    properties = other.properties
    if properties.get("openslide.vendor") not in VENDORS or any("openslide.bounds" in name for name in properties):
        return False
    with closing(TiffSlideReader(path)) as fast:
        if not fast.images or [tuple(s) for s in fast.level_sizes] != [tuple(s) for s in other.level_sizes]:
            return False
        return all(
            image.is_whole and all(_same(image, other, level, box) for box in _telling_boxes(image))
            for level, image in enumerate(fast.images)
        )


def _telling_boxes(image: TiledImage) -> list[Box]:
    counts = np.asarray(image.page.databytecounts, np.int64)
    width, height = image.tile_size
    columns = -(-image.page.imagewidth // width)
    rows = -(-image.page.imagelength // height)
    from_middle = np.abs(np.arange(len(counts)) - (rows // 2 * columns + columns // 2))
    found = {_first_intact(image, -counts), _first_intact(image, from_middle)}
    boxes = []
    for index in (index for index in found if index is not None):
        tile = Box(index % columns * width, index // columns * height, width, height)
        inside = tile.intersect(Box(0, 0, image.page.imagewidth, image.page.imagelength))
        boxes.append(Box(inside.x, inside.y, min(inside.width, PROBE_PX), min(inside.height, PROBE_PX)))
    return boxes


def _first_intact(image: TiledImage, order: NDArray[np.int64]) -> int | None:
    """Return the tile with the smallest value that has no damage, or None."""
    tiles = map(int, np.argsort(order, kind="stable"))
    return next((index for index in tiles if not image.has_damage(index)), None)


def _same(image: TiledImage, other: Reader, level: int, box: Box) -> bool:
    size_l0, size_lv = other.level_sizes[0], other.level_sizes[level]
    # If these are not whole numbers, OpenSlide is off by a fraction of a pixel and interpolates. Its value then lies
    # between those around the true pixel, except at the edge of a tile, where it blends a seam.
    exact = size_l0[0] * size_lv[1] == size_l0[1] * size_lv[0] and size_l0[0] % size_lv[0] == 0
    reach = 0 if exact else 2
    fast_HWC = image.read(box, _refuse).astype(np.int16)
    around = (2 * reach + 1, 2 * reach + 1, 1)
    below_HWC = ndimage.minimum_filter(fast_HWC, around) - MOST_DIFFERENCE
    above_HWC = ndimage.maximum_filter(fast_HWC, around) + MOST_DIFFERENCE
    slow_HWC = other.read(level, box)
    good_HWC = (slow_HWC >= below_HWC) & (slow_HWC <= above_HWC)
    inner = slice(reach, -reach or None)
    return bool(good_HWC[inner, inner].all())


def _refuse(tile: Box) -> None:
    raise ValueError(f"the JPEG stream of the tile at ({tile.x}, {tile.y}) looks damaged")
