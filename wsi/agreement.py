"""Whether tiffslide, the faster of the two libraries, gives the pixels of a slide that OpenSlide gives."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
from scipy import ndimage

from wsi.box import Box
from wsi.readers import Reader, TiffSlideReader
from wsi.tiff_tiles import TiledImage

VENDORS = frozenset({"aperio", "generic-tiff"})
"""OpenSlide's formats whose levels are TIFF images and nothing else: no gaps, overlaps, bounds or several regions."""

MOST_DIFFERENCE = 2
"""Of 255, in any channel of any pixel. Both libraries decode JPEG with libjpeg-turbo and JPEG 2000 with OpenJPEG, and
gave the very same level-0 pixels on the slides at hand; other builds may round a colour conversion the other way, by 1
in each of two steps. A wrong colour space, a shift or a wrong tile differ by tens."""

PROBE_PX = 256
"""Longest side of what is compared of a tile."""


def tiffslide_agrees(path: Path, other: Reader) -> bool:
    """Whether tiffslide can stand in for OpenSlide, whose reader of the same file is `other`.

    The slide is of one of `VENDORS` and states no bounds; both have the same level sizes; every level is one whole TIFF
    image of 8-bit RGB tiles; and on each level the tile that takes the most bytes, which is the most telling one, and
    the middle one are the same. Raises what the libraries raise.
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
    counts = image.page.databytecounts
    width, height = image.tile_size
    columns = -(-image.page.imagewidth // width)
    rows = -(-image.page.imagelength // height)
    boxes = []
    for index in {int(np.argmax(counts)), rows // 2 * columns + columns // 2}:
        tile = Box(index % columns * width, index // columns * height, width, height)
        inside = tile.intersect(Box(0, 0, image.page.imagewidth, image.page.imagelength))
        boxes.append(Box(inside.x, inside.y, min(inside.width, PROBE_PX), min(inside.height, PROBE_PX)))
    return boxes


def _same(image: TiledImage, other: Reader, level: int, box: Box) -> bool:
    size_l0, size_lv = other.level_sizes[0], other.level_sizes[level]
    # Where these are no whole numbers, OpenSlide is off by a part of a pixel and interpolates: its pixel then lies
    # between those around the true one, except at a tile's edge, where it mends a seam.
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
    raise ValueError(f"the JPEG stream of the tile at {tile.x}, {tile.y} is unusual")
