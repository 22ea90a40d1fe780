"""Changes that make an image unlike the images that a model was trained on: other colors, blur, other pixel sizes.

The check for unfamiliar tissue is fitted with such images (`pipeline.training.familiarity`). A change keeps the size of
an image in pixels, and so its number of windows.

Shape suffixes: H and W an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pipeline.training.augment import EOSIN, replace_eosin

RGB = NDArray[np.uint8]

_ORDERS = [order for order in permutations(range(3)) if order != (0, 1, 2)]
"""All other orders of red, green and blue."""

SIMILAR = 0.9
"""A stain whose color has at least this cosine with that of eosin, as optical densities, counts as eosin."""


def gray(rgb_HWC: RGB, _rng: np.random.Generator) -> RGB:
    """Return the image without colors."""
    return np.asarray(Image.fromarray(rgb_HWC).convert("L").convert("RGB"))


def inverted(rgb_HWC: RGB, _rng: np.random.Generator) -> RGB:
    """Return the negative."""
    return 255 - rgb_HWC


def reordered(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return the image with red, green and blue in another order."""
    order = _ORDERS[int(rng.integers(len(_ORDERS)))]
    return np.ascontiguousarray(rgb_HWC[..., order])


def turned_hue(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return the image with its hue turned by at least an eighth of the circle."""
    image = Image.fromarray(rgb_HWC).convert("HSV")
    hsv_HWC = np.array(image)
    hsv_HWC[..., 0] += np.uint8(rng.integers(32, 225))  # of 256, wraps around
    return np.asarray(Image.frombytes("HSV", image.size, hsv_HWC.tobytes()).convert("RGB"))


def restained(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return the image with a stain of another color in place of eosin."""
    while True:
        color_3 = np.abs(rng.normal(size=3)).astype(np.float32)
        color_3 /= np.linalg.norm(color_3)
        if color_3 @ EOSIN < SIMILAR:
            return replace_eosin(rgb_HWC, color_3)


def blurred(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return the image blurred by a Gaussian with a standard deviation of 1.5 to 5 px."""
    return np.asarray(Image.fromarray(rgb_HWC).filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 5))))


def shrunk(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return the image at 0.4 to 0.65 times its size, mirrored at its right and lower edges to fill the same area."""
    height, width = rgb_HWC.shape[:2]
    factor = rng.uniform(0.4, 0.65)
    small_HWC = _resized(rgb_HWC, max(1, round(height * factor)), max(1, round(width * factor)))
    missing = ((0, height - small_HWC.shape[0]), (0, width - small_HWC.shape[1]), (0, 0))
    return np.pad(small_HWC, missing, mode="symmetric")


def enlarged(rgb_HWC: RGB, rng: np.random.Generator) -> RGB:
    """Return a random part of the image, enlarged 1.6 to 2.5 times to the size of the image."""
    height, width = rgb_HWC.shape[:2]
    factor = rng.uniform(1.6, 2.5)
    rows, columns = max(1, round(height / factor)), max(1, round(width / factor))
    y, x = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    return _resized(rgb_HWC[y : y + rows, x : x + columns], height, width)


def _resized(rgb_HWC: RGB, height: int, width: int) -> RGB:
    return np.asarray(Image.fromarray(rgb_HWC).resize((width, height), Image.Resampling.LANCZOS))


CHANGES: Mapping[str, Callable[[RGB, np.random.Generator], RGB]] = {
    change.__name__: change for change in (gray, inverted, reordered, turned_hue, restained, blurred, shrunk, enlarged)
}
"""All kinds of changes by name. Those with random parameters draw them from the generator."""
