"""What each pixel of a thumbnail looks like: stained, pale, gray, tinted, or like ink.

All quantities are optical densities relative to the slide's own glass: od = ln(glass / value) for each channel
(Beer and Lambert). Of a pixel, `most` and `least` are the largest and the smallest density of its channels, and
`color` is their difference. A gray pixel has no color, however dark it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsi.masks import strips

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
_GRAY_MOST = 0.12
_TINT_MOST = 0.05

_SMOOTH_REACH = 2
"""Rows around a pixel on which its smoothed color depends."""
_TEXTURE_REACH = 5
"""Rows around a pixel of the smoothed image on which its texture depends."""

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
    """With less texture than tissue has."""
    TEXTURED = np.uint8(64)
    """With more texture than glass has."""


def has_look(looks_HW: NDArray[np.uint8], look: np.uint8) -> NDArray[np.bool_]:
    """Return the pixels that have one of these looks."""
    return np.asarray((looks_HW & look) > 0)


class Densities(NamedTuple):
    """The optical densities of some rows of a thumbnail."""

    od_HWC: Floats
    light_HW: Floats
    """Density of the brightness (ITU-R BT.601). JPEG keeps it exactly, unlike the colors."""

    @property
    def mean_HW(self) -> Floats:
        """Return the mean over the channels."""
        return np.asarray((self.od_HWC[..., 0] + self.od_HWC[..., 1] + self.od_HWC[..., 2]) / 3)

    @property
    def most_HW(self) -> Floats:
        """Return the largest density of the channels."""
        return self._over_channels(np.maximum)

    @property
    def least_HW(self) -> Floats:
        """Return the smallest density of the channels."""
        return self._over_channels(np.minimum)

    def _over_channels(self, choose: np.ufunc) -> Floats:
        # Channel by channel: a tenth of the time of max(axis=2) and min(axis=2).
        return np.asarray(choose(choose(self.od_HWC[..., 0], self.od_HWC[..., 1]), self.od_HWC[..., 2]))


def glass_color(rgb_HWC: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Return the color of the glass: the most frequent color of bright, flat, almost colorless pixels.

    Returns `DEFAULT_GLASS` if less than `_GLASS_SHARE` of the image looks like glass.
    """
    bins = 256 // _BIN
    counts, sums_C = np.zeros(bins**3), np.zeros((3, bins**3))
    for rows in strips(rgb_HWC.shape[:2]):
        glass_NC = rgb_HWC[rows][_is_glass_like(rgb_HWC, rows)]
        red, green, blue = (glass_NC // _BIN).T.astype(np.int64)
        place_N = (red * bins + green) * bins + blue
        counts += np.bincount(place_N, minlength=bins**3)
        for c in range(3):
            sums_C[c] += np.bincount(place_N, weights=glass_NC[:, c], minlength=bins**3)
    around = ndimage.correlate(counts.reshape(bins, bins, bins), np.ones((3, 3, 3)), mode="constant")
    best = np.unravel_index(int(around.argmax()), around.shape)
    if around[best] < max(1.0, _GLASS_SHARE * rgb_HWC.shape[0] * rgb_HWC.shape[1]):
        return DEFAULT_GLASS
    window = tuple(slice(max(0, int(i) - 1), int(i) + 2) for i in best)
    red, green, blue = (sums_C[c].reshape(bins, bins, bins)[window].sum() / around[best] for c in range(3))
    return float(red), float(green), float(blue)


def _is_glass_like(rgb_HWC: NDArray[np.uint8], rows: slice) -> NDArray[np.bool_]:
    top = max(0, rows.start - 1)
    near_HW = rgb_HWC[top : rows.stop + 1, :, 1]
    inner = slice(rows.start - top, rows.start - top + rows.stop - rows.start)
    range_HW = ndimage.maximum_filter(near_HW, 3)[inner] - ndimage.minimum_filter(near_HW, 3)[inner]
    red_HW, green_HW, blue_HW = (rgb_HWC[rows, :, c].astype(np.int16) for c in range(3))
    largest_HW = np.maximum(np.maximum(red_HW, green_HW), blue_HW)
    smallest_HW = np.minimum(np.minimum(red_HW, green_HW), blue_HW)
    pink_HW = np.minimum(red_HW, blue_HW) - green_HW
    return np.asarray(
        (range_HW <= _FLAT_RANGE)
        & (largest_HW >= _GLASS_VALUE)
        & (largest_HW - smallest_HW <= _GLASS_CHROMA)
        & (pink_HW <= _GLASS_PINK)
    )


def densities(rgb_HWC: NDArray[np.uint8], rows: slice, glass: tuple[float, float, float], reach: int = 0) -> Densities:
    """Return the densities of some rows of the smoothed image, and of `reach` rows around them.

    They are equal to those rows of the whole image.
    """
    top, bottom = max(0, rows.start - reach), min(rgb_HWC.shape[0], rows.stop + reach)
    first = max(0, top - _SMOOTH_REACH)
    part_HWC = rgb_HWC[first : bottom + _SMOOTH_REACH].astype(np.float32)
    smooth_HWC = ndimage.gaussian_filter(
        part_HWC, sigma=(0.5, 0.5, 0), radius=(_SMOOTH_REACH, _SMOOTH_REACH, 0), mode="nearest"
    )[top - first :][: bottom - top]
    step_HWC = np.round(smooth_HWC * _STEPS).astype(np.uint16)
    od_HWC = np.empty(step_HWC.shape, np.float32)
    for c in range(3):
        od_HWC[..., c] = _table(glass[c])[step_HWC[..., c]]
    red_HW, green_HW, blue_HW = (step_HWC[..., c].astype(np.int32) for c in range(3))
    light_HW = (299 * red_HW + 587 * green_HW + 114 * blue_HW) // 1000
    glass_light = float(np.dot(_LIGHT, glass))
    return Densities(od_HWC, _table(glass_light)[light_HW])


def densities_in(
    rgb_HWC: NDArray[np.uint8], rows: slice, columns: slice, glass: tuple[float, float, float]
) -> Densities:
    """Return the densities of some rows and columns of the smoothed image."""
    left = max(0, columns.start - _SMOOTH_REACH)
    part = densities(rgb_HWC[:, left : columns.stop + _SMOOTH_REACH], rows, glass)
    inner = slice(columns.start - left, columns.stop - left)
    return Densities(part.od_HWC[:, inner], part.light_HW[:, inner])


def _table(glass: float) -> Floats:
    """Return the density of every step of a channel in which the glass has this value."""
    values = np.arange(255 * _STEPS + 1) / _STEPS
    return np.asarray(np.round(np.maximum(0, np.log((glass + 1) / (values + 1))), 4).astype(np.float32))


def looks(rgb_HWC: NDArray[np.uint8], glass: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Return the `Look` of every pixel of a thumbnail."""
    looks_HW = np.empty(rgb_HWC.shape[:2], np.uint8)
    for rows in strips(looks_HW.shape):
        looks_HW[rows] = _looks(rgb_HWC, rows, glass)
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


def _looks(rgb_HWC: NDArray[np.uint8], rows: slice, glass: tuple[float, float, float]) -> NDArray[np.uint8]:
    wide = densities(rgb_HWC, rows, glass, _TEXTURE_REACH)
    start = min(_TEXTURE_REACH, rows.start)
    inner = slice(start, start + rows.stop - rows.start)
    texture_HW = _spread(wide.light_HW, sigma=2.0)[inner]
    fine_HW = _spread(wide.light_HW, sigma=1.0)[inner]
    part = Densities(wide.od_HWC[inner], wide.light_HW[inner])
    most_HW = part.most_HW
    near_HW = ndimage.maximum_filter(wide.most_HW, 5)[inner]
    color_HW = most_HW - part.least_HW
    # Gray objects are not exactly gray: the tolerance grows with their density.
    has_color_HW = (color_HW > 0.08 * most_HW + 0.02) & ~_is_black(most_HW, part.least_HW)
    # Mountant and tinted glass are yellow or blue; the faintest eosin absorbs green most.
    red_HW, green_HW, blue_HW = (part.od_HWC[..., c] for c in range(3))
    pink_HW = green_HW - np.maximum(red_HW, blue_HW) > _PINK
    yellow_HW = blue_HW > 1.15 * np.maximum(red_HW, green_HW)
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
        (Look.GRAY, ~has_color_HW & (most_HW > _GRAY_MOST)),
        (Look.TINTED, has_color_HW & (most_HW > _TINT_MOST) & (most_HW <= _STAINED_MOST) & ~pale_HW),
        (Look.INK, has_color_HW & _is_ink(part.od_HWC)),
        (Look.TEXTURED, texture_HW > _GLASS_TEXTURE),
        (Look.SMOOTH, fine_HW < 0.05 * part.mean_HW),
    ):
        looks_HW[here_HW] |= look
    return looks_HW


def _is_black(most_HW: Floats, least_HW: Floats) -> NDArray[np.bool_]:
    """Return the pixels so dark that the difference between their channels is noise."""
    return np.asarray((most_HW > 1.8) & (np.exp(-least_HW) - np.exp(-most_HW) < 0.06))


def _spread(light_HW: Floats, sigma: float) -> Floats:
    """Return the standard deviation around each pixel, weighted by a Gaussian."""

    def blurred(values_HW: Floats) -> Floats:
        return np.asarray(ndimage.gaussian_filter(values_HW, sigma, radius=_TEXTURE_REACH, mode="nearest"))

    return np.asarray(np.sqrt(np.maximum(0, blurred(light_HW**2) - blurred(light_HW) ** 2)))


def _is_ink(od_HWC: Floats) -> NDArray[np.bool_]:
    """Return the pixels in a color of pens. Some stains have these colors too, but not as smoothly."""
    red, green, blue = od_HWC[..., 0], od_HWC[..., 1], od_HWC[..., 2]
    # Hematoxylin and eosin both absorb more green than red. Blue, green, cyan and turquoise inks do not.
    blue_or_green = (red > 1.1 * green + 0.02) & (red > 0.2)
    # Eosin and blood absorb some red. Red and pink inks do not.
    red_or_pink = (green > 0.6) & (red < 0.12 * green)
    # Hematoxylin absorbs some blue. Violet ink does not.
    violet = (green > 0.9) & (blue < 0.25 * green)
    yellow_or_orange = (blue > 0.5) & (blue > 1.3 * green) & (red < 0.2 * blue)
    return np.asarray(blue_or_green | red_or_pink | violet | yellow_or_orange)
