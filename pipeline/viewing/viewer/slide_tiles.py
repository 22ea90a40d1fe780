"""Tiles of a slide at any halving of level 0, as JPEG.

Frames besides those of `wsi.grid`: `z` are pixels of a zoom level, level 0 halved `level` times from the corner of the
slide's bounds; zoom pixel i covers level-0 pixels [i * 2**level, (i + 1) * 2**level) of that frame.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.ome_zarr import CHUNK_OUT
from wsi.box import Box
from wsi.levels import pick_level
from wsi.readers import READERS
from wsi.resample import area_mean
from wsi.slide import Slide

TILE = CHUNK_OUT  # like the tiles of the map
"""Largest side of a tile. The side is a multiple of the slide's own tiles, so that few pixels are decoded in vain."""

QUALITY = 85

PIECE_PX = 2048
"""Side of the part that is decoded at a time, in the slide's own pixels. It bounds the memory of coarse tiles."""

ON_DEMAND_PX = 4096**2
"""Largest number of own pixels that are reduced to coarse tiles while a browser waits. A slide whose smallest level has
more gets an overview (`pipeline.viewing.viewer.overview`)."""

OVERVIEW_PX = 4096
"""Largest length of the overview's longer side: 50 MB."""


class SlideTiles:
    """The tiles of an open slide. Threads may share it."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        bounds_l0 = slide.info.bounds_l0
        self.size_l0 = (bounds_l0.width, bounds_l0.height)
        self.tile = _tile_side(slide)
        self.levels = zoom_levels(self.size_l0, self.tile)
        self.overview_level = self._overview_level()
        """The finest level that comes from an overview; None if there is no overview."""

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """Return one tile as JPEG; None if there is no such tile. Raises the errors of `Slide.read`."""
        box_z = self.box_z(level, column, row)
        if box_z is None or (self.overview_level is not None and level >= self.overview_level):
            return None
        return jpeg(Image.fromarray(self.pixels(level, box_z)))

    def box_z(self, level: int, column: int, row: int) -> Box | None:
        """Return the box of a tile, cut at the slide's edge; None if there is no such tile."""
        if not (0 <= level < self.levels and column >= 0 and row >= 0):
            return None
        box_z = Box(column * self.tile, row * self.tile, self.tile, self.tile).intersect(Box(0, 0, *self.size_z(level)))
        return box_z if box_z.width and box_z.height else None

    def size_z(self, level: int) -> tuple[int, int]:
        """Return the (width, height) of a zoom level."""
        width, height = self.size_l0
        return -(-width >> level), -(-height >> level)

    def pieces(self, level: int, box_z: Box) -> Iterator[Box]:
        """Yield the parts of a box that are decoded at a time."""
        side_z = max(1, int(PIECE_PX / self._factor(level)))
        for y in range(box_z.y, box_z.bottom, side_z):
            for x in range(box_z.x, box_z.right, side_z):
                yield Box(x, y, side_z, side_z).intersect(box_z)

    def pixels(self, level: int, box_z: Box) -> NDArray[np.uint8]:
        """Return a box of a zoom level as rgb_HWC: means of the slide's pixels. Raises the errors of `Slide.read`."""
        rgb_HWC = np.empty((box_z.height, box_z.width, 3), np.uint8)
        for piece_z in self.pieces(level, box_z):
            y, x = piece_z.y - box_z.y, piece_z.x - box_z.x
            rgb_HWC[y : y + piece_z.height, x : x + piece_z.width] = self._piece(level, piece_z)
        return rgb_HWC

    def _piece(self, level: int, box_z: Box) -> NDArray[np.uint8]:
        level_lv, downsample = self._nearest(level)
        factor = self._factor(level)
        bounds_l0 = self._slide.info.bounds_l0
        origin_lv = (round(bounds_l0.x / downsample), round(bounds_l0.y / downsample))
        x, y = math.floor(box_z.x * factor), math.floor(box_z.y * factor)
        right, bottom = math.ceil(box_z.right * factor), math.ceil(box_z.bottom * factor)
        rgb_HWC = self._slide.read(level_lv, Box(x, y, right - x, bottom - y).shift(*origin_lv)).rgb_HWC
        if factor == int(factor):
            # The same means as `area_mean`, in a quarter of the time.
            return np.asarray(Image.fromarray(rgb_HWC).reduce(int(factor)))
        return area_mean(rgb_HWC, (x, y), box_z, factor)

    def _factor(self, level: int) -> float:
        """Return the pixels of the nearest own level per zoom pixel."""
        return _whole(2**level / self._nearest(level)[1], max(self.size_l0) >> level)

    def _nearest(self, level: int) -> tuple[int, float]:
        """Return the slide's own level to read a zoom level from, and its downsample."""
        downsamples = self._slide.info.level_downsamples
        level_lv = pick_level(downsamples, 2**level)
        return level_lv, downsamples[level_lv]

    def _overview_level(self) -> int | None:
        downsample = self._nearest(self.levels - 1)[1]
        width, height = self.size_l0
        if width * height / downsample**2 <= ON_DEMAND_PX:
            return None
        return next(level for level in range(self.levels) if max(self.size_z(level)) <= OVERVIEW_PX)


def jpeg(picture: Image.Image) -> bytes:
    """Return a picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def zoom_levels(size_l0: tuple[int, int], tile: int = TILE) -> int:
    """Return the number of zoom levels: level 0 is halved until it fits into one tile."""
    return (-(-max(size_l0) // tile) - 1).bit_length() + 1


def _tile_side(slide: Slide) -> int:
    """Return the largest even multiple of the slide's own tile side up to `TILE`, or `TILE` if there is none."""
    with closing(READERS[slide.info.backend](slide.info.path)) as reader:
        own = int(reader.properties.get("openslide.level[0].tile-width", TILE))
    side = TILE // max(own, 1) * own
    return side if side >= TILE // 2 and side % 2 == 0 else TILE


def _whole(factor: float, length_z: int) -> float:
    """Return the factor as a whole number if this moves every pixel by less than one pixel of its level."""
    whole = max(1, round(factor))
    return float(whole) if abs(factor - whole) * length_z < 1 else factor
