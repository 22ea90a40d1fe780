"""Read a small image of a whole slide."""

from __future__ import annotations

import logging
import math
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box
from wsi.levels import pick_level
from wsi.resample import area_mean
from wsi.slide import SHOWN_UNREADABLE, Slide

log = logging.getLogger(__name__)

STRIP_PX = 8_000_000
"""Pixels of the level that are in memory at a time while a thumbnail is read."""


class Thumbnail(NamedTuple):
    """A small image of a slide's bounds. Parts that could not be read are white."""

    rgb_HWC: NDArray[np.uint8]
    l0_per_px: float
    unreadable_share: float
    unreadable_px: tuple[Box, ...]
    """The parts that could not be read, in pixels of the thumbnail, rounded outward."""


def read_thumbnail(slide: Slide, mpp: float) -> Thumbnail:
    """Return the slide's bounds at about `mpp` micrometers per pixel.

    The level is that of `pick_level`. It is read in strips, and the strips of a wide slide in parts, so that memory
    stays small for a slide with one level.
    """
    info = slide.info
    downsamples = info.level_downsamples
    level = pick_level(downsamples, mpp / info.mpp)
    downsample = downsamples[level]
    factor = max(1, round(mpp / (info.mpp * downsample)))
    bounds = info.bounds_l0
    x, y = round(bounds.x / downsample), round(bounds.y / downsample)
    width, height = (math.ceil(length / downsample / factor) for length in (bounds.width, bounds.height))
    rgb_HWC = np.empty((height, width, 3), np.uint8)
    unreadable_lv: list[Box] = []
    rows = max(1, STRIP_PX // (width * factor**2))
    columns = min(width, max(1, STRIP_PX // (rows * factor**2)))
    for top, left in product(range(0, height, rows), range(0, width, columns)):
        part = Box(left, top, min(columns, width - left), min(rows, height - top))
        corner_lv = (x + left * factor, y + top * factor)
        pixels = slide.read(level, Box(*corner_lv, part.width * factor, part.height * factor))
        unreadable_lv += pixels.unreadable_lv
        part_HWC = area_mean(pixels.rgb_HWC, (0, 0), Box(0, 0, part.width, part.height), factor)
        rgb_HWC[part.y : part.bottom, part.x : part.right] = part_HWC
    if len(unreadable_lv) > SHOWN_UNREADABLE:
        log.warning("%s: %d parts of the thumbnail cannot be read", info.path.name, len(unreadable_lv))
    share = sum(box.width * box.height for box in unreadable_lv) / (width * height * factor**2)
    unreadable_px = tuple(_outward(box.shift(-x, -y), factor) for box in unreadable_lv)
    return Thumbnail(rgb_HWC, downsample * factor, share, unreadable_px)


def _outward(box: Box, factor: int) -> Box:
    """Return a box in units of `factor`, rounded outward."""
    left, top = box.x // factor, box.y // factor
    return Box(left, top, -(-box.right // factor) - left, -(-box.bottom // factor) - top)
