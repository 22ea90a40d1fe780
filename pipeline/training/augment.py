"""Augmentation of training images: flips, quarter turns, and changes of the stains and of the scanner.

Shape suffixes: H and W the image, B boxes (x, y, width, height), L layers of labels.
"""

from __future__ import annotations

import io
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
"""Optical density of each byte."""

_STAINS_33 = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=np.float32)
_STAINS_33 /= np.linalg.norm(_STAINS_33, axis=1, keepdims=True)
"""Red, green and blue density of hematoxylin, eosin and a residual, one per row (Ruifrok and Johnston 2001)."""

EOSIN = _STAINS_33[1]
"""Optical density of eosin in red, green and blue, a vector of length 1."""


class Augmentation(NamedTuple):
    """How training views are changed."""

    stain: float = 0.0
    """Strength of `restain`."""
    imaging: float = 0.0
    """Strength of `rescanned`."""
    blur: float = 0.0
    """Probability of `blurred`."""
    moves: Literal["symmetries", "flips", "mirror"] = "symmetries"
    """The moves that `Move.draw` draws from."""

    def colors(self, rgb_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Return the image with another stain, scanner and sharpness."""
        return blurred(rescanned(restain(rgb_HWC, self.stain, rng), self.imaging, rng), self.blur, rng)


class Move(NamedTuple):
    """One of the eight symmetries of a square: quarter turns counterclockwise, then a left-right flip."""

    turns: int
    flip: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, moves: str = "symmetries") -> Self:
        """Return one of the eight `symmetries`, of the four `flips` (left-right and up-down), or a `mirror` move.

        `mirror` is a left-right flip or nothing. All moves of a set are equally likely.
        """
        # An up-down flip is half a turn and a left-right flip.
        choices = {"symmetries": (0, 1, 2, 3), "flips": (0, 2), "mirror": (0,)}[moves]
        return cls(choices[int(rng.integers(len(choices)))], bool(rng.integers(2)))

    def image(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the moved image or label map, with axes (H, W, ...)."""
        turned = np.rot90(array, self.turns)
        moved: NDArray[np.uint8] = np.ascontiguousarray(turned[:, ::-1] if self.flip else turned)
        return moved

    def boxes(self, boxes_B4: NDArray[np.int64], width: int, height: int) -> NDArray[np.int64]:
        """Return the boxes moved along with an image of this size."""
        x, y, w, h = boxes_B4.T
        for _ in range(self.turns):
            x, y, w, h, width, height = y, width - x - w, h, w, height, width
        if self.flip:
            x = width - x - w
        return np.stack([x, y, w, h], axis=1)


def restain(rgb_HWC: NDArray[np.uint8], strength: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image with each stain's amount scaled by up to 1 ± `strength` and shifted by up to ± `strength` / 5.

    The stains are the optical density vectors of Ruifrok and Johnston (Anal. Quant. Cytol. Histol. 2001). Tellez et al.
    (IEEE TMI 2018) augment H&E this way.
    """
    if strength == 0:
        return rgb_HWC
    scale_3 = 1 + rng.uniform(-strength, strength, 3).astype(np.float32)
    shift_3 = rng.uniform(-strength, strength, 3).astype(np.float32) / 5
    # Unmixing, scaling and mixing are one matrix product: c = od S^-1, od' = (c * scale + shift) S.
    matrix_33 = np.linalg.inv(_STAINS_33) @ (scale_3[:, None] * _STAINS_33)
    return _image(_DENSITY[rgb_HWC] @ matrix_33 + shift_3 @ _STAINS_33)


def replace_eosin(rgb_HWC: NDArray[np.uint8], color_3: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the image with a stain of another color in place of eosin.

    `color_3` is the optical density of the stain in red, green and blue, a vector of length 1.
    """
    others_33 = _STAINS_33.copy()
    others_33[1] = color_3
    return _image(_DENSITY[rgb_HWC] @ (np.linalg.inv(_STAINS_33) @ others_33))


def _image(density_HWC: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the image with these optical densities."""
    rgb_HWC: NDArray[np.uint8] = np.clip(np.rint(np.exp(-density_HWC) * 256 - 1), 0, 255).astype(np.uint8)
    return rgb_HWC


def rescanned(rgb_HWC: NDArray[np.uint8], strength: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image as another scanner might record it.

    Brightness changes by up to ± `strength` / 5, and contrast and saturation by up to ± `strength`. With a probability
    of `strength`, the image is blurred (a Gaussian of up to 1 px), and with the same probability it is compressed as
    JPEG of quality 40 to 95.
    """
    if strength == 0:
        return rgb_HWC
    factors = 1 + rng.uniform(-strength, strength, 3) * np.array([0.2, 1.0, 1.0])
    blur_px, quality = rng.uniform(0, 1), int(rng.integers(40, 96))
    blurs, compresses = rng.uniform(size=2) < strength
    image = Image.fromarray(rgb_HWC)
    for enhancer, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        image = enhancer(image).enhance(float(factor))
    if blurs:
        image = image.filter(ImageFilter.GaussianBlur(blur_px))
    if compresses:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        image = Image.open(stream)
    return np.asarray(image, dtype=np.uint8)


def blurred(rgb_HWC: NDArray[np.uint8], probability: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image, or with this probability the image blurred by a Gaussian of up to 1 px (Han et al.'s code)."""
    if probability == 0 or rng.uniform() >= probability:
        return rgb_HWC
    return np.asarray(Image.fromarray(rgb_HWC).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1))), dtype=np.uint8)
