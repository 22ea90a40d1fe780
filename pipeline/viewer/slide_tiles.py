"""Tiles of a slide at any halving of level 0, as JPEG.

Frames beside those of `wsi.grid`: `z` are pixels of a zoom level, level 0 halved `level` times from the corner of the
slide's bounds; zoom pixel i covers level-0 pixels [i * 2**level, (i + 1) * 2**level) of that frame.
"""

from __future__ import annotations

import io
import math
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.viewer.cache import ByteCache
from wsi.grid import Box
from wsi.readers import READERS
from wsi.resample import area_mean
from wsi.slide import Slide

TILE = 512
"""Side of a tile, or a little less: a whole number of the slide's own tiles is decoded with the least waste."""

QUALITY = 85

MOST_HALVINGS_READ = 2
"""Tiles more than this many halvings above the slide's nearest level are made of the tiles below them, which keeps what
is decoded at a time small. Only slides without a full pyramid have such tiles."""


class SlideTiles:
    """The tiles of an open slide. Threads may share it."""

    def __init__(self, slide: Slide, cache: ByteCache) -> None:
        self._slide = slide
        self._cache = cache
        self._own = object()  # in the keys: an id would be given again once this one is gone
        bounds_l0 = slide.info.bounds_l0
        self.size_l0 = (bounds_l0.width, bounds_l0.height)
        self.tile = _tile_side(slide)
        self.levels = zoom_levels(self.size_l0, self.tile)

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """One tile as JPEG; None where there is no such tile. Raises what `Slide.read` raises."""
        box_z = self._box_z(level, column, row)
        if box_z is None:
            return None
        buffer = io.BytesIO()
        Image.fromarray(self._pixels(level, box_z)).save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()

    def _box_z(self, level: int, column: int, row: int) -> Box | None:
        """The pixels of a tile, cut at the slide's edge; None where there is no such tile."""
        if not (0 <= level < self.levels and column >= 0 and row >= 0):
            return None
        box_z = Box(column * self.tile, row * self.tile, self.tile, self.tile).intersect(
            Box(0, 0, *self._size_z(level))
        )
        return box_z if box_z.width and box_z.height else None

    def _size_z(self, level: int) -> tuple[int, int]:
        width, height = self.size_l0
        return -(-width >> level), -(-height >> level)

    def _pixels(self, level: int, box_z: Box) -> NDArray[np.uint8]:
        info = self._slide.info
        level_lv, downsample = self._nearest(level)
        if self._made_of_finer(level, downsample):
            return self._from_finer(level, box_z)
        factor = _whole(2**level / downsample, max(self.size_l0) >> level)
        origin_lv = (round(info.bounds_l0.x / downsample), round(info.bounds_l0.y / downsample))
        x, y = math.floor(box_z.x * factor), math.floor(box_z.y * factor)
        box = Box(x, y, math.ceil(box_z.right * factor) - x, math.ceil(box_z.bottom * factor) - y)
        rgb_HWC = self._slide.read(level_lv, box.shift(*origin_lv)).rgb_HWC
        if factor == int(factor):
            # The same means as `area_mean` takes, in a quarter of the time.
            return np.asarray(Image.fromarray(rgb_HWC).reduce(int(factor)))
        return area_mean(rgb_HWC, (x, y), box_z, factor)

    def _nearest(self, level: int) -> tuple[int, float]:
        """The slide's own level to read a zoom level from, and its downsample."""
        downsamples = self._slide.info.level_downsamples
        fine_enough = [i for i, d in enumerate(downsamples) if d <= 2**level * 1.02]
        level_lv = max(fine_enough, key=lambda i: downsamples[i], default=0)
        return level_lv, downsamples[level_lv]

    def _made_of_finer(self, level: int, downsample: float) -> bool:
        return bool(2**level / downsample > 2**MOST_HALVINGS_READ * 1.02)

    def _from_finer(self, level: int, box_z: Box) -> NDArray[np.uint8]:
        """Means of 2 × 2 pixels of the four tiles one level below; an edge pixel without a fellow counts twice."""
        finer_z = Box(2 * box_z.x, 2 * box_z.y, 2 * box_z.width, 2 * box_z.height)
        inside_z = finer_z.intersect(Box(0, 0, *self._size_z(level - 1)))
        canvas_HWC = np.empty((inside_z.height, inside_z.width, 3), np.uint8)
        for row in range(inside_z.y // self.tile, -(-inside_z.bottom // self.tile)):
            for column in range(inside_z.x // self.tile, -(-inside_z.right // self.tile)):
                part_z = self._box_z(level - 1, column, row)
                assert part_z is not None
                y, x = part_z.y - inside_z.y, part_z.x - inside_z.x
                canvas_HWC[y : y + part_z.height, x : x + part_z.width] = self._kept_pixels(level - 1, part_z)
        missing = ((0, finer_z.height - inside_z.height), (0, finer_z.width - inside_z.width), (0, 0))
        return np.asarray(Image.fromarray(np.pad(canvas_HWC, missing, "edge")).reduce(2))

    def _kept_pixels(self, level: int, box_z: Box) -> NDArray[np.uint8]:
        if not self._made_of_finer(level, self._nearest(level)[1]):
            # One read gives it: the room is for what is dear, which a whole slide's coarse levels then fit into.
            return self._pixels(level, box_z)
        key = (self._own, "pixels", level, box_z)
        pixels = self._cache.get(key, lambda: self._pixels(level, box_z).tobytes())
        return np.frombuffer(pixels, np.uint8).reshape(box_z.height, box_z.width, 3)


def zoom_levels(size_l0: tuple[int, int], tile: int = TILE) -> int:
    """Number of zoom levels: level 0 halved until all of it is one tile."""
    return (-(-max(size_l0) // tile) - 1).bit_length() + 1


def _tile_side(slide: Slide) -> int:
    """The largest even number up to `TILE` that is a multiple of the side of the slide's own tiles; else `TILE`."""
    with closing(READERS[slide.info.backend](slide.info.path)) as reader:
        own = int(reader.properties.get("openslide.level[0].tile-width", TILE))
    side = TILE // max(own, 1) * own
    return side if side >= TILE // 2 and side % 2 == 0 else TILE


def _whole(factor: float, length_z: int) -> float:
    """The factor as a whole number where that moves no pixel of the slide by as much as one of its level's pixels."""
    whole = max(1, round(factor))
    return float(whole) if abs(factor - whole) * length_z < 1 else factor
