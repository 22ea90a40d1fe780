"""What each pixel of a thumbnail looks like: stained, pale, gray, tinted, or like ink.

All quantities are optical densities relative to the slide's own glass: od = ln(glass / value) for each channel
(Beer and Lambert). Of a pixel, `most` and `least` are the largest and the smallest density of its channels, and
`color` is their difference. A gray pixel has no color, however dark it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.masks import Mask, patches, strips, wider

Floats = NDArray[np.float32]

DEFAULT_GLASS = (245.0, 245.0, 245.0)
"""Color of the glass of a slide that shows none."""

# Glass is bright and has about the same value in every channel. A pink tint counts only if it is faint, because a
# slide full of pale eosin has no glass.
_GLASS_VALUE = 170
_GLASS_CHROMA = 40
_GLASS_PINK = 12
_GLASS_SHARE = 0.005
_FLAT_RANGE = 8
_BIN = 4

# Densities.
_PALE_COLOR, _PALE_TEXTURE, _PALE_LEAST = 0.03, 0.01, 0.04
_PINK = 0.025
_YELLOW_TEXTURE = 0.02
_GLASS_TEXTURE = 0.012
_BLUR = 0.25
_PALE_LIGHT, _STAINED_LIGHT = 0.35, 0.15
_STAINED_MOST, _STAINED_COLOR = 0.2, 0.06
_GRAY_MOST, _DARK_MOST = 0.12, 0.5
_TINT_MOST = 0.05
_PLAIN_MOST = 0.02
"""A pixel has no look if no density around it is larger. The deviation of such densities is at most half of this value,
which is less than `_GLASS_TEXTURE`."""

_SMOOTH_REACH = 2
"""Rows and columns around a pixel on which its smoothed color depends."""
_TEXTURE_REACH = 5
"""Rows and columns around a pixel of the smoothed image on which its texture depends."""

_LIGHT = (0.299, 0.587, 0.114)
"""Shares of the channels in the brightness (ITU-R BT.601)."""

_STEPS = 4
"""Steps per gray level of the table of densities, so that a density does not depend on the last bit of a float."""


class Look:
    """What a pixel looks like: the bits of a byte."""

    STAINED = np.uint8(1)
    """Clearly colored: tissue, unless it is ink."""
    PALE = np.uint8(2)
    """Faintly colored, with texture or pink: tissue if there is enough of it."""
    GRAY = np.uint8(4)
    """Dark without color."""
    TINTED = np.uint8(8)
    """Faintly colored, without texture and not pink."""
    INK = np.uint8(16)
    """In a color of pens, which some stains have too."""
    SMOOTH = np.uint8(32)
    """Gray or in a color of pens, with less texture than tissue has."""
    TEXTURED = np.uint8(64)
    """With more texture than glass has."""
    DARK = np.uint8(128)
    """Gray and darker than the strands of fat."""


def has_look(looks_HW: NDArray[np.uint8], look: np.uint8) -> NDArray[np.bool_]:
    """Return the pixels that have one of these looks."""
    return np.asarray((looks_HW & look) > 0)


class Densities(NamedTuple):
    """The optical densities of a part of a thumbnail."""

    od_CHW: Floats
    light_HW: Floats
    """Density of the brightness (ITU-R BT.601). JPEG keeps it exactly, unlike the colors."""

    @property
    def mean_HW(self) -> Floats:
        """Return the mean over the channels."""
        return np.asarray((self.od_CHW[0] + self.od_CHW[1] + self.od_CHW[2]) / 3)

    @property
    def most_HW(self) -> Floats:
        """Return the largest density of the channels."""
        return np.asarray(np.maximum(np.maximum(self.od_CHW[0], self.od_CHW[1]), self.od_CHW[2]))

    @property
    def least_HW(self) -> Floats:
        """Return the smallest density of the channels."""
        return np.asarray(np.minimum(np.minimum(self.od_CHW[0], self.od_CHW[1]), self.od_CHW[2]))

    def part(self, rows: slice, columns: slice) -> Densities:
        """Return the densities of some of the rows and columns."""
        return Densities(self.od_CHW[:, rows, columns], self.light_HW[rows, columns])


def glass_color(rgb_HWC: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Return the color of the glass: the most frequent color of bright, flat, almost colorless pixels.

    If that color is pink relative to another such color, it is pale tissue, and the other color is the glass. Returns
    `DEFAULT_GLASS` if less than `_GLASS_SHARE` of the image looks like glass.
    """
    bins = 256 // _BIN
    counts, glass_HW = np.zeros(bins**3), np.empty(rgb_HWC.shape[:2], bool)
    for rows in strips(glass_HW.shape):
        red_HW, green_HW, blue_HW = _channels(rgb_HWC, rows)
        glass_HW[rows] = _is_glass_like(red_HW, green_HW, blue_HW) & _is_flat(rgb_HWC, rows)
        red_N, green_N, blue_N = (
            (channel_HW[glass_HW[rows]] // _BIN).astype(np.int32) for channel_HW in (red_HW, green_HW, blue_HW)
        )
        counts += np.bincount((red_N * bins + green_N) * bins + blue_N, minlength=bins**3)
    around = ndimage.correlate(counts.reshape(bins, bins, bins), np.ones((3, 3, 3)), mode="constant")
    best = tuple(map(int, np.unravel_index(int(around.argmax()), around.shape)))
    least = max(1.0, _GLASS_SHARE * glass_HW.size)
    if around[best] < least:
        return DEFAULT_GLASS
    best = _glass_around_tissue(around, best, least)
    sums = [0, 0, 0]
    for rows in strips(glass_HW.shape):
        channels = _channels(rgb_HWC, rows)
        here_HW = glass_HW[rows]
        for channel_HW, place in zip(channels, best, strict=True):
            here_HW &= (channel_HW >= (int(place) - 1) * _BIN) & (channel_HW < (int(place) + 2) * _BIN)
        sums = [total + int(channel_HW[here_HW].sum()) for total, channel_HW in zip(sums, channels, strict=True)]
    red, green, blue = (total / around[best] for total in sums)
    return float(red), float(green), float(blue)


def _glass_around_tissue(around: NDArray[np.float64], best: tuple[int, ...], least: float) -> tuple[int, ...]:
    """Return the most frequent color relative to which the best one is pink, or the best one if there is none.

    Both are bins. White does not count, because it may be padding around the scanned area.
    """
    # Beside the color of noisy glass there are others, which are not peaks.
    is_peak = (around >= least) & (around == ndimage.maximum_filter(around, 5, mode="constant"))
    is_peak[-2:, -2:, -2:] = False
    levels = np.log((np.arange(256 // _BIN) + 0.5) * _BIN)
    red, green, blue = np.meshgrid(*(levels - levels[place] for place in best), indexing="ij")
    is_pink = (green - np.maximum(red, blue) > _PINK) & (green > _PALE_LEAST) & (np.minimum(red, blue) >= 0)
    found = np.where(is_pink & is_peak, around, 0)
    return tuple(map(int, np.unravel_index(int(found.argmax()), found.shape))) if found.any() else best


def _channels(rgb_HWC: NDArray[np.uint8], rows: slice) -> list[NDArray[np.uint8]]:
    # Operations on every third number take several times as long.
    return [np.ascontiguousarray(rgb_HWC[rows, :, c]) for c in range(3)]


def _is_flat(rgb_HWC: NDArray[np.uint8], rows: slice) -> Mask:
    near = wider(rows, 1, rgb_HWC.shape[0])
    green_HW = np.ascontiguousarray(rgb_HWC[near, :, 1])
    range_HW = _around(green_HW, 1, np.maximum) - _around(green_HW, 1, np.minimum)
    return np.asarray(range_HW[_inside(rows, near)] <= _FLAT_RANGE)


def _is_glass_like(red_HW: NDArray[np.uint8], green_HW: NDArray[np.uint8], blue_HW: NDArray[np.uint8]) -> Mask:
    largest_HW = np.maximum(np.maximum(red_HW, green_HW), blue_HW)
    smaller_HW = np.minimum(red_HW, blue_HW)
    smallest_HW = np.minimum(smaller_HW, green_HW)
    return np.asarray(
        (largest_HW >= _GLASS_VALUE)
        & (largest_HW - smallest_HW <= _GLASS_CHROMA)
        & (smaller_HW - smallest_HW <= _GLASS_PINK)
    )


def _around(values_HW: NDArray[Any], reach: int, choose: np.ufunc) -> NDArray[Any]:
    """Return the largest or the smallest value in the square around each pixel. `choose` is np.maximum or np.minimum.

    Shifted arrays take a fifth of the time of ndimage.maximum_filter.
    """
    for axis in range(2):
        values_HW = values_HW.swapaxes(0, axis)
        result_HW = values_HW.copy(order="K")
        for step in range(1, reach + 1):
            choose(result_HW[step:], values_HW[:-step], out=result_HW[step:])
            choose(result_HW[:-step], values_HW[step:], out=result_HW[:-step])
        values_HW = result_HW.swapaxes(0, axis)
    return values_HW


def densities(
    rgb_HWC: NDArray[np.uint8], rows: slice, columns: slice, glass: tuple[float, float, float], reach: int = 0
) -> Densities:
    """Return the densities of some rows and columns of the smoothed image, and of `reach` pixels around them.

    They are equal to those of the whole image.
    """
    height, width = rgb_HWC.shape[:2]
    rows, columns = wider(rows, reach, height), wider(columns, reach, width)
    outer_rows, outer_columns = wider(rows, _SMOOTH_REACH, height), wider(columns, _SMOOTH_REACH, width)
    part_CHW = rgb_HWC[outer_rows, outer_columns].transpose(2, 0, 1).astype(np.float32, order="C")
    smooth_CHW = ndimage.gaussian_filter(
        part_CHW, sigma=(0, 0.5, 0.5), radius=(0, _SMOOTH_REACH, _SMOOTH_REACH), mode="nearest"
    )[:, _inside(rows, outer_rows), _inside(columns, outer_columns)]
    step_CHW = np.round(smooth_CHW * _STEPS).astype(np.uint16)
    od_CHW = np.stack([_table(glass[c]).take(step_CHW[c]) for c in range(3)])
    red_HW, green_HW, blue_HW = step_CHW.astype(np.uint32)
    light_HW = (299 * red_HW + 587 * green_HW + 114 * blue_HW) // 1000
    return Densities(od_CHW, _table(float(np.dot(_LIGHT, glass))).take(light_HW))


def _inside(part: slice, outer: slice) -> slice:
    """Return the position of a part of an axis within a larger part."""
    return slice(part.start - outer.start, part.stop - outer.start)


@lru_cache(maxsize=8)
def _table(glass: float) -> Floats:
    """Return the density of every step of a channel in which the glass has this value, as a read-only array."""
    values = np.arange(255 * _STEPS + 1) / _STEPS
    table = np.round(np.maximum(0, np.log((glass + 1) / (values + 1))), 4).astype(np.float32)
    table.flags.writeable = False
    return table


def looks(rgb_HWC: NDArray[np.uint8], glass: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Return the `Look` of every pixel of a thumbnail."""
    # The smallest value of each channel whose density is plain.
    darkest = [int((_table(value)[::_STEPS] > _PLAIN_MOST).sum()) for value in glass]
    plain_HW = np.logical_and.reduce([rgb_HWC[..., c] >= darkest[c] for c in range(3)])
    looks_HW = np.zeros(plain_HW.shape, np.uint8)
    for rows, columns in patches(~plain_HW, _SMOOTH_REACH + _TEXTURE_REACH):
        looks_HW[rows, columns] = _looks(rgb_HWC, rows, columns, glass)
    return looks_HW


def bare_and_stained(
    rgb_HWC: NDArray[np.uint8], glass: tuple[float, float, float]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pixels are as bright as glass, and which are clearly colored, each by its own value alone.

    A bare pixel is paler than any `Look.PALE` pixel. A stained one has the densities of `Look.STAINED`.
    """
    bare_HW, stained_HW = np.empty(rgb_HWC.shape[:2], bool), np.empty(rgb_HWC.shape[:2], bool)
    tables = [_table(value)[::_STEPS] for value in glass]
    for rows in strips(bare_HW.shape):
        red, green, blue = (table[rgb_HWC[rows, :, c]] for c, table in enumerate(tables))
        most_HW = np.maximum(np.maximum(red, green), blue)
        color_HW = most_HW - np.minimum(np.minimum(red, green), blue)
        bare_HW[rows] = most_HW < _PALE_LEAST
        stained_HW[rows] = (most_HW > _STAINED_MOST) & (color_HW > _STAINED_COLOR)
    return bare_HW, stained_HW


def _looks(
    rgb_HWC: NDArray[np.uint8], rows: slice, columns: slice, glass: tuple[float, float, float]
) -> NDArray[np.uint8]:
    height, width = rgb_HWC.shape[:2]
    wide = densities(rgb_HWC, rows, columns, glass, _TEXTURE_REACH)
    inner = (
        _inside(rows, wider(rows, _TEXTURE_REACH, height)),
        _inside(columns, wider(columns, _TEXTURE_REACH, width)),
    )
    texture_HW = _spread(wide.light_HW, sigma=2.0)[inner]
    part = wide.part(*inner)
    most_HW, least_HW = part.most_HW, part.least_HW
    near_HW = _around(wide.most_HW, 2, np.maximum)[inner]
    color_HW = most_HW - least_HW
    # Gray objects are not exactly gray: the tolerance grows with their density.
    has_color_HW = (color_HW > 0.08 * most_HW + 0.02) & ~_is_black(most_HW, least_HW)
    gray_HW = ~has_color_HW & (most_HW > _GRAY_MOST)
    ink_HW = has_color_HW & _is_ink(part.od_CHW)
    # Mountant and tinted glass are yellow or blue; the faintest eosin absorbs green most.
    red_HW, green_HW, blue_HW = part.od_CHW
    pink_HW = green_HW - np.maximum(red_HW, blue_HW) > _PINK
    yellow_HW = (blue_HW > 1.15 * np.maximum(red_HW, green_HW)) & has_color_HW & (most_HW > _PALE_LEAST)
    fine_HW = _fine_texture(wide.light_HW, inner, gray_HW | ink_HW | yellow_HW)
    textured_HW = np.where(yellow_HW, fine_HW > _YELLOW_TEXTURE, texture_HW > _PALE_TEXTURE)
    pale_HW = textured_HW | pink_HW
    # Not the blur around a stained pixel, which would enlarge the tissue by a pixel on every side. Nor the colors
    # that JPEG spreads around it, which are as bright as glass, as is yellow mountant.
    sharp_HW = (most_HW > _BLUR * near_HW) & (part.light_HW > _STAINED_LIGHT * most_HW)
    pale_HW &= part.light_HW > _PALE_LIGHT * most_HW
    looks_HW = np.zeros(most_HW.shape, np.uint8)
    for look, here_HW in (
        (Look.STAINED, has_color_HW & (most_HW > _STAINED_MOST) & (color_HW > _STAINED_COLOR) & sharp_HW),
        (Look.PALE, has_color_HW & (most_HW > _PALE_LEAST) & (color_HW > _PALE_COLOR) & pale_HW & sharp_HW),
        (Look.GRAY, gray_HW),
        (Look.TINTED, has_color_HW & (most_HW > _TINT_MOST) & (most_HW <= _STAINED_MOST) & ~pale_HW),
        (Look.INK, ink_HW),
        (Look.TEXTURED, texture_HW > _GLASS_TEXTURE),
        (Look.DARK, gray_HW & (most_HW > _DARK_MOST)),
        (Look.SMOOTH, (gray_HW | ink_HW) & (fine_HW < 0.05 * part.mean_HW)),
    ):
        looks_HW |= here_HW * look
    return looks_HW


def _fine_texture(light_HW: Floats, inner: tuple[slice, slice], needed_HW: Mask) -> Floats:
    """Return the texture on the finest scale over the `inner` rows and columns of densities.

    It is computed only in boxes around the needed pixels, because few pixels need it.
    """
    fine_HW = np.zeros(needed_HW.shape, np.float32)
    for here in patches(needed_HW):
        rows, columns = (
            slice(one.start + part.start, one.stop + part.start) for one, part in zip(here, inner, strict=True)
        )
        outer_rows, outer_columns = (
            wider(one, _TEXTURE_REACH, length) for one, length in zip((rows, columns), light_HW.shape, strict=True)
        )
        spread_HW = _spread(light_HW[outer_rows, outer_columns], sigma=1.0)
        fine_HW[here] = spread_HW[_inside(rows, outer_rows), _inside(columns, outer_columns)]
    return fine_HW


def _is_black(most_HW: Floats, least_HW: Floats) -> NDArray[np.bool_]:
    """Return the pixels so dark that the difference between their channels is noise."""
    dark_HW = most_HW > 1.8
    if dark_HW.any():
        dark_HW &= np.exp(-least_HW) - np.exp(-most_HW) < 0.06
    return dark_HW


def _spread(light_HW: Floats, sigma: float) -> Floats:
    """Return the standard deviation around each pixel, weighted by a Gaussian."""

    def blurred(values_HW: Floats) -> Floats:
        return np.asarray(ndimage.gaussian_filter(values_HW, sigma, radius=_TEXTURE_REACH, mode="nearest"))

    return np.asarray(np.sqrt(np.maximum(0, blurred(light_HW**2) - blurred(light_HW) ** 2)))


def _is_ink(od_CHW: Floats) -> NDArray[np.bool_]:
    """Return the pixels in a color of pens. Some stains have these colors too, but not as smoothly."""
    red, green, blue = od_CHW
    # Hematoxylin and eosin both absorb more green than red. Blue, green, cyan and turquoise inks do not.
    blue_or_green = (red > 1.1 * green + 0.02) & (red > 0.2)
    # Eosin and blood absorb some red. Red and pink inks do not.
    red_or_pink = (green > 0.6) & (red < 0.12 * green)
    # Hematoxylin absorbs some blue. Violet ink does not.
    violet = (green > 0.9) & (blue < 0.25 * green)
    yellow_or_orange = (blue > 0.5) & (blue > 1.3 * green) & (red < 0.2 * blue)
    return np.asarray(blue_or_green | red_or_pink | violet | yellow_or_orange)
