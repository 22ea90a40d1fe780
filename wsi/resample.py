"""Read pixels at the model's resolution: from a level of the slide, averaged by area."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsi.box import Box
from wsi.grid import Grid
from wsi.slide import BACKGROUND, Pixels, Slide

STRIP_LV = 512
"""Rows of the level that are in memory at a time while tiles are read. It is a multiple of usual JPEG tile sides, so
that few JPEG tiles are decoded for two strips."""

_STRIP_ROWS = 8
"""Target rows that are averaged at a time, so that the sums stay in the processor's cache."""

_Tap = tuple[NDArray[np.int64], NDArray[np.float32]]


class TilePixels(NamedTuple):
    """The pixels of some tiles of one block, on one canvas that covers all of them."""

    canvas_HWC: NDArray[np.uint8]
    canvas_m: Box
    unreadable_m: tuple[Box, ...]
    """Parts that could not be read, in model pixels, rounded outward. They are white."""


def read_tiles(slide: Slide, grid: Grid, tiles_m: Sequence[Box]) -> TilePixels:
    """Read the pixels of the tiles, of which there is at least one. Each pixel of the level is read once.

    Strips are as wide as the tiles that touch them, so that a canvas with few tiles is not read as a whole.
    """
    left, top = min(t.x for t in tiles_m), min(t.y for t in tiles_m)
    canvas_m = Box(left, top, max(t.right for t in tiles_m) - left, max(t.bottom for t in tiles_m) - top)
    canvas_HWC = np.full((canvas_m.height, canvas_m.width, 3), BACKGROUND, np.uint8)
    unreadable: list[Box] = []
    rows_m = max(1, int(STRIP_LV / grid.lv_per_m))
    for start in range(canvas_m.y // rows_m * rows_m, canvas_m.bottom, rows_m):
        rows = Box(canvas_m.x, start, canvas_m.width, rows_m).intersect(canvas_m)
        touching = [t for t in tiles_m if t.intersect(rows).height]
        if not touching:
            continue
        x = min(t.x for t in touching)
        strip_m = Box(x, rows.y, max(t.right for t in touching) - x, rows.height)
        pixels = read_model_pixels(slide, grid, strip_m)
        unreadable += [grid.outer_box_m(box_lv) for box_lv in pixels.unreadable_lv]
        y, x = strip_m.y - canvas_m.y, strip_m.x - canvas_m.x
        canvas_HWC[y : y + strip_m.height, x : x + strip_m.width] = pixels.rgb_HWC
    return TilePixels(canvas_HWC, canvas_m, tuple(unreadable))


def read_model_pixels(slide: Slide, grid: Grid, box_m: Box) -> Pixels:
    """Return the pixels of a box in model pixels, as rgb_HWC, and the parts of the level that could not be read.

    Model pixel i is the mean over level pixels [i * lv_per_m, (i + 1) * lv_per_m), with edge pixels weighted by the
    covered part. So the value of a pixel does not depend on the box it is read in.
    """
    box_lv = grid.box_lv(box_m)
    pixels = slide.read(grid.level, box_lv)
    corner = (box_lv.x - grid.origin_lv[0], box_lv.y - grid.origin_lv[1])
    return Pixels(area_mean(pixels.rgb_HWC, corner, box_m, grid.lv_per_m), pixels.unreadable_lv)


def area_mean(rgb_HWC: NDArray[np.uint8], corner: tuple[int, int], target: Box, factor: float) -> NDArray[np.uint8]:
    """Resample an image by area: target pixel i covers source pixels [i * factor, (i + 1) * factor).

    `rgb_HWC` starts at source pixel `corner` (x, y) and covers the target box. Means are rounded half up.
    """
    if factor == int(factor):
        n = int(factor)
        x, y = target.x * n - corner[0], target.y * n - corner[1]
        return _whole_mean(rgb_HWC[y : y + target.height * n, x : x + target.width * n], n)
    result_HWC = np.empty((target.height, target.width, 3), np.uint8)
    rows = _taps(corner[1], target.y, target.height, factor, rgb_HWC.shape[0])
    columns = _taps(corner[0], target.x, target.width, factor, rgb_HWC.shape[1])
    for first in range(0, target.height, _STRIP_ROWS):
        strip = slice(first, first + _STRIP_ROWS)
        rows_HWC = _weighted(rgb_HWC, [(index[strip], weight[strip]) for index, weight in rows])
        # Swapped axes make the weighted runs whole rows of memory instead of three numbers.
        columns_WHC = _weighted(np.ascontiguousarray(rows_HWC.swapaxes(0, 1)), columns)
        columns_WHC += np.float32(0.5)
        result_HWC[strip] = columns_WHC.astype(np.uint8).swapaxes(0, 1)
    return result_HWC


def _whole_mean(rgb_HWC: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    if n == 1:
        return rgb_HWC
    height, width = rgb_HWC.shape[0] // n, rgb_HWC.shape[1] // n
    result_HWC = np.empty((height, width, 3), np.uint8)
    if n & (n - 1) == 0:
        # Pillow takes half the time, but rounds halves up exactly only for powers of two.
        for first in range(0, height, _STRIP_ROWS):
            last = min(first + _STRIP_ROWS, height)
            result_HWC[first:last] = Image.fromarray(rgb_HWC[first * n : last * n, : width * n]).reduce(n)
        return result_HWC
    # uint16 holds the sum of up to 257 pixels.
    total = np.uint16 if n * n <= 256 else np.uint32
    for first in range(0, height, _STRIP_ROWS):
        count = min(_STRIP_ROWS, height - first)
        strip_HWC = rgb_HWC[first * n : (first + count) * n]
        # Strided sums, rows first. A reshape to six axes and a mean take ten times as long.
        rows_HWC = np.add(strip_HWC[::n], strip_HWC[1::n], dtype=total)
        for y in range(2, n):
            rows_HWC += strip_HWC[y::n]
        sums_HWC = rows_HWC[:, ::n] + rows_HWC[:, 1::n]
        for x in range(2, n):
            sums_HWC += rows_HWC[:, x::n]
        sums_HWC += n * n // 2
        sums_HWC //= n * n
        result_HWC[first : first + count] = sums_HWC
    return result_HWC


def _taps(corner: int, first: int, count: int, factor: float, size: int) -> list[_Tap]:
    """Return the source pixels of each target pixel, as indices from `corner`, and their weights.

    The list has one pair of arrays for each source pixel that a target may touch. The weights come from absolute
    positions, so that a pixel has the same bits in every box.
    """
    starts = np.arange(first, first + count, dtype=np.float64) * factor
    stops = starts + factor
    base = np.floor(starts).astype(np.int64)
    taps = []
    for tap in range(math.ceil(factor) + 1):
        position = base + tap
        weight = np.clip(np.minimum(stops, position + 1) - np.maximum(starts, position), 0, None) / factor
        taps.append((np.clip(position - corner, 0, size - 1), weight.astype(np.float32)))
    return taps


def _weighted(values: NDArray[np.uint8] | NDArray[np.float32], taps: Sequence[_Tap]) -> NDArray[np.float32]:
    """Return the weighted sum along axis 0, always added in the same order."""
    shape = (len(taps[0][0]), *values.shape[1:])
    result, part = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for index, weight in taps:
        np.multiply(values.take(index, axis=0), weight.reshape(-1, *[1] * (values.ndim - 1)), out=part)
        result += part
    return result
