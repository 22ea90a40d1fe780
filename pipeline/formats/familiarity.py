"""familiarity.png: how far each part of the tissue lies from the training data of the model.

A pixel is a cell of CELL_OUT × CELL_OUT pixels of the map, from the map's origin. Its value is 0 if the cell contains
no tissue, else 1 + 127 d. The distance d of the cell is in units of the model's limit, and at most 2. The palette makes
unfamiliar cells (d > 1) visible and all others transparent, so that viewers can lay the picture over the slide.

Shape suffixes: H and W the cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import Color

CELL_OUT = 8
"""Side of a cell in pixels of the map. Sides of blocks are multiples of it."""

NO_TISSUE = 0
LIMIT = 128
"""Value of a cell at the limit of the model. Larger values are unfamiliar."""

UNFAMILIAR: Color = (190, 24, 93)
"""Color of unfamiliar cells. No class of a shipped model has it."""

OPACITY = 150
"""Opacity of unfamiliar cells in the picture, of 255."""

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True)
class FamiliarityMap:
    """The familiarity of a slide's tissue."""

    values_HW: UInt8Array
    """One value per cell, as in the picture."""
    share: float
    """Share of the tissue's area that is unfamiliar, from 0 to 1."""

    def at(self, columns_out: NDArray[np.integer], rows_out: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Return whether the map's pixels of these rows and columns are unfamiliar, (rows, columns)."""
        unfamiliar_HW: NDArray[np.bool_] = self.values_HW > LIMIT
        rows_and_columns = np.ix_(rows_out // CELL_OUT, columns_out // CELL_OUT)
        return np.asarray(unfamiliar_HW[rows_and_columns])


def encoded(distance_HW: NDArray[np.floating], is_tissue_HW: NDArray[np.bool_]) -> UInt8Array:
    """Return the values of cells at these distances, in units of the model's limit."""
    values_HW = 1 + np.rint(127 * np.clip(distance_HW, 0, 2))
    return np.where(is_tissue_HW, values_HW, NO_TISSUE).astype(np.uint8)


def write_familiarity(path: Path, familiarity: FamiliarityMap) -> None:
    """Write the picture."""
    image = Image.fromarray(familiarity.values_HW)
    image.putpalette(UNFAMILIAR * 256)
    image.save(path, "PNG", transparency=bytes(OPACITY if value > LIMIT else 0 for value in range(256)))


def read_familiarity(path: Path) -> UInt8Array | None:
    """Return the values of the picture, (H, W), or None if the file is missing, damaged or without values.

    A picture that another program saved with colors has no values.
    """
    try:
        with Image.open(path) as image:
            return np.array(image, np.uint8) if image.mode in ("P", "L") else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow raises them for damaged files
        return None
