"""Thumbnails of slides with known tissue: pieces on glass, and beside them pen, dust, hair, mountant and borders.

Everything is painted in optical density, which adds up where things lie over each other. A pixel has `MPP` micrometers.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import KDTree

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Color = tuple[float, float, float]

MPP = 8.0

HEMATOXYLIN: Color = (0.65, 0.70, 0.29)
EOSIN: Color = (0.07, 0.99, 0.11)
"""Absorption of red, green and blue (Ruifrok and Johnston 2001)."""

STAINS: dict[str, tuple[Color, Color]] = {
    "H&E": (HEMATOXYLIN, EOSIN),
    "blue counterstain": ((0.80, 0.60, 0.25), (0.35, 0.25, 0.10)),
    "trichrome blue": (HEMATOXYLIN, (0.85, 0.50, 0.10)),
    "methyl green": ((0.98, 0.14, 0.13), (0.49, 0.07, 0.06)),
    "hematoxylin only": (HEMATOXYLIN, (0.13, 0.14, 0.06)),
    "DAB": (HEMATOXYLIN, (0.27, 0.57, 0.78)),
    "melanin": ((0.90, 1.00, 1.10), (0.45, 0.50, 0.55)),
    "blood": ((0.20, 1.10, 1.30), (0.12, 0.66, 0.78)),
}
"""Absorption of nuclei and of the rest, by stain."""

PENS: dict[str, tuple[int, int, int]] = {
    "blue": (40, 80, 190), "green": (30, 150, 80), "cyan": (60, 160, 190), "red": (215, 45, 50),
    "pink": (240, 60, 150), "violet": (120, 40, 180), "orange": (250, 140, 30), "yellow": (250, 230, 60),
}  # fmt: skip
"""Colors of pens on white glass."""


class Specimen:
    """A thumbnail that is painted step by step. `truth_HW` is its tissue."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.od_HWC = np.zeros((size[1], size[0], 3))
        self.truth_HW = np.zeros((size[1], size[0]), bool)

    def add(self, here_HW: Mask, od_HWC: Floats | Color, *, tissue: bool = False) -> None:
        """Add a density inside a mask."""
        self.od_HWC += here_HW[..., None] * np.asarray(od_HWC)
        self.truth_HW |= here_HW & tissue

    def ink(self, here_HW: Mask, color: tuple[int, int, int], grain: float = 0.0) -> None:
        """Add the ink of a pen with noise of this deviation in each pixel, relative to its density."""
        noise_HW1 = 1 + grain * self.rng.normal(0, 1, (*here_HW.shape, 1))
        self.add(here_HW, np.asarray(od_of(color)) * noise_HW1)

    def fat(self, here_HW: Mask, strength: float = 1.0, cell_px: float = 10.0) -> None:
        """Add fat: bright cells of about this width between thin strands. Some are stained, most are gray."""
        centers = self.rng.uniform(0, max(here_HW.shape), (2, int(2 * (max(here_HW.shape) / cell_px) ** 2)))
        cells_HW = _nearest(centers, here_HW.shape)
        strands_HW = (cells_HW != np.roll(cells_HW, 1, 0)) | (cells_HW != np.roll(cells_HW, 1, 1))
        color_HWC = np.where(self.rng.random((cells_HW.max() + 1, 1)) < 0.3, EOSIN, (0.3, 0.3, 0.3))[cells_HW]
        od_HWC = ndimage.gaussian_filter(0.5 * strength * strands_HW[..., None] * color_HWC, (0.6, 0.6, 0))
        self.add(here_HW, od_HWC, tissue=True)

    def image(
        self, glass: Color = (244, 243, 244), *, noise: float = 1.0, jpeg: int | None = None
    ) -> NDArray[np.uint8]:
        """Return the thumbnail with sensor noise, and optionally with the artifacts of a JPEG quality."""
        values_HWC = np.asarray(glass) * np.exp(-self.od_HWC)
        values_HWC += self.rng.normal(0, noise, values_HWC.shape)
        rgb_HWC = np.clip(np.round(values_HWC), 0, 255).astype(np.uint8)
        if jpeg is None:
            return rgb_HWC
        file = io.BytesIO()
        Image.fromarray(rgb_HWC).save(file, "JPEG", quality=jpeg)
        return np.asarray(Image.open(file))

    @property
    def _places(self) -> tuple[Floats, Floats]:
        rows, columns = np.indices(self.truth_HW.shape)
        return rows.astype(float), columns.astype(float)

    def box(self, x: int, y: int, width: int, height: int) -> Mask:
        """Return a box."""
        here_HW = np.zeros(self.truth_HW.shape, bool)
        here_HW[y : y + height, x : x + width] = True
        return here_HW

    def blob(self, x: float, y: float, radius: float) -> Mask:
        """Return a disk with an irregular border."""
        rows, columns = self._places
        wobble_HW = _smooth_noise(self.rng, self.truth_HW.shape, radius / 4)
        return np.asarray(np.hypot(columns - x, rows - y) + 0.15 * radius * wobble_HW < radius)

    def stroke(self, start: tuple[float, float], end: tuple[float, float], width: float) -> Mask:
        """Return a slightly bent stroke of a pen between two points (x, y)."""
        rows, columns = self._places
        (x0, y0), (x1, y1) = start, end
        length = np.hypot(x1 - x0, y1 - y0)
        along_HW = ((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / length
        across_HW = ((columns - x0) * (y1 - y0) - (rows - y0) * (x1 - x0)) / length
        across_HW += 0.08 * length * np.sin(np.pi * along_HW / length)
        return np.asarray((np.abs(across_HW) < width / 2) & (along_HW > 0) & (along_HW < length))


def stained(
    shape: tuple[int, int], rng: np.random.Generator, stains: tuple[Color, Color], strength: float = 1.0
) -> Floats:
    """Return the densities of tissue as a thumbnail shows it: patches of nuclei in the rest, with fine grain."""
    nuclei_HW = np.clip(0.35 + 0.3 * _smooth_noise(rng, shape, 4.0) + 0.15 * rng.normal(0, 1, shape), 0.02, None)
    rest_HW = np.clip(0.45 + 0.15 * _smooth_noise(rng, shape, 8.0) + 0.1 * rng.normal(0, 1, shape), 0.02, None)
    rest_HW *= _smooth_noise(rng, shape, 2.0) < 1.5  # small gaps
    both_HWC = nuclei_HW[..., None] * np.asarray(stains[0]) + rest_HW[..., None] * np.asarray(stains[1])
    return np.asarray(strength * ndimage.gaussian_filter(both_HWC, (0.6, 0.6, 0)))


def od_of(color: tuple[int, int, int], glass: Color = (255, 255, 255)) -> Color:
    """Return the density of a color."""
    red, green, blue = (float(np.log((g + 1) / (value + 1))) for value, g in zip(color, glass, strict=True))
    return red, green, blue


def one_piece(stain: str, strength: float = 1.0, size: tuple[int, int] = (300, 220), radius: float = 60) -> Specimen:
    """Return a specimen with one piece of tissue on its left side."""
    specimen = Specimen(size, seed=1)
    here_HW = specimen.blob(radius + 20, size[1] / 2, radius)
    specimen.add(here_HW, stained(size[::-1], specimen.rng, STAINS[stain], strength), tissue=True)
    return specimen


def scores(mask_HW: Mask, specimen: Specimen) -> tuple[float, float]:
    """Return recall and precision of a mask."""
    both = float((mask_HW & specimen.truth_HW).sum())
    return both / float(specimen.truth_HW.sum()), both / float(max(1, mask_HW.sum()))


def _nearest(centers: Floats, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return for each pixel the number of the nearest center; `centers` are (y, x)."""
    places = np.moveaxis(np.indices(shape), 0, -1)
    return np.asarray(KDTree(centers.T).query(places)[1])


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Floats:
    """Return noise of mean 0 and deviation 1 that changes over about `sigma` pixels."""
    noise_HW = ndimage.gaussian_filter(rng.normal(0, 1, shape), sigma, mode="wrap")
    return np.asarray(noise_HW / noise_HW.std())
