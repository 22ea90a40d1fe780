"""What tissue detection finds beside plain tissue: folds, pen, dust, and everything else that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi.masks import pieces


class LeftOut(IntEnum):
    """The kinds of areas that are not plain tissue. The values are those of the stored layer; 0 is none of them."""

    FOLD = 1
    """Tissue in two layers. It stays in the map unless `--exclude-folds` is given."""
    PEN = 2
    """Smooth areas in a color of pens."""
    DUST = 3
    """Gray objects: dust, hair, black ink, air bubbles, and structure without a stain."""
    BORDER = 4
    """Black or gray areas at the edge of the image, which the scanner did not scan."""
    TINT = 5
    """Smooth areas with a faint color: mountant, or a second glass."""
    FRAGMENT = 6
    """Stained pieces below the smallest size of tissue."""
    UNREADABLE = 7
    """Parts of the file that cannot be read."""

    @property
    def title(self) -> str:
        """Return the name for people and programs."""
        return _TITLES[self]

    @property
    def color(self) -> tuple[int, int, int]:
        """Return the color of the layer in pictures."""
        return _COLORS[self]

    @property
    def is_structure(self) -> bool:
        """Return whether a slide without tissue that has this kind may have tissue that was not recognized."""
        return self in (LeftOut.PEN, LeftOut.DUST, LeftOut.FRAGMENT)


_TITLES = {
    LeftOut.FOLD: "fold",
    LeftOut.PEN: "pen",
    LeftOut.DUST: "dust",
    LeftOut.BORDER: "scanner border",
    LeftOut.TINT: "tinted glass",
    LeftOut.FRAGMENT: "small fragment",
    LeftOut.UNREADABLE: "unreadable",
}

_COLORS = {
    LeftOut.FOLD: (255, 140, 0),
    LeftOut.PEN: (0, 90, 220),
    LeftOut.DUST: (90, 90, 90),
    LeftOut.BORDER: (0, 0, 0),
    LeftOut.TINT: (200, 180, 60),
    LeftOut.FRAGMENT: (0, 150, 60),
    LeftOut.UNREADABLE: (220, 0, 60),
}


class Extent(NamedTuple):
    """How much of one kind a slide has."""

    area_um2: float
    pieces: int


def extents(left_out_HW: NDArray[np.uint8], mpp: float) -> Mapping[LeftOut, Extent]:
    """Return area and number of pieces of every kind in a layer with pixels of `mpp` micrometers."""
    return {kind: _extent(left_out_HW == kind, mpp) for kind in LeftOut}


def _extent(mask_HW: NDArray[np.bool_], mpp: float) -> Extent:
    present = np.count_nonzero(mask_HW)
    return Extent(float(present) * mpp**2, pieces(mask_HW).number if present else 0)
