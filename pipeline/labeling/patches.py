"""The patches of a slide: which places lie on tissue, their pixels, and what lies around them.

Frames are those of `wsi.grid`: m are pixels of the patches' size, l0 level-0 pixels. Places count from the corner of
the slide's bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.labeling.events import Place
from wsi.box import Box
from wsi.errors import SlideReadError
from wsi.grid import make_grid, whole_pixels_m
from wsi.mirror import mirror_outside
from wsi.resample import read_model_pixels
from wsi.slide import Slide
from wsi.thumbnail import read_thumbnail
from wsi.tissue import Tissue

T = TypeVar("T")

MIN_TISSUE = 0.5
"""A patch is asked about if at least this share of it is tissue."""

CONTEXT = 2
"""Side of the picture around a patch, in sides of the patch."""

THUMBNAIL_PX = 320
"""Longer side of the picture of the whole slide."""

_CELLS = 8
"""Cells per side of a patch in which its tissue is measured."""


class SlidePatches:
    """The patches of an open slide. Threads may share it."""

    def __init__(self, slide: Slide, digest: str, mpp: float, side: int) -> None:
        """Raises ResolutionError if the slide is much coarser than `mpp` micrometers per pixel."""
        self._slide = slide
        self._digest = digest
        self._grid = make_grid(slide.info, model_mpp=mpp, tile_m=side, output_stride=1, block_out=side)
        self._whole_m = whole_pixels_m(slide.info, self._grid)
        self._mpp, self._side = mpp, side
        self._l0_per_m = self._grid.l0_per_out

    @property
    def name(self) -> str:
        """Return the name of the slide's file."""
        return self._slide.info.path.name

    @property
    def side_l0(self) -> float:
        """Return the side of a patch in level-0 pixels."""
        return self._side * self._l0_per_m

    @property
    def size_l0(self) -> tuple[int, int]:
        """Return (width, height) of the slide's bounds in level-0 pixels."""
        return self._slide.info.bounds_l0.width, self._slide.info.bounds_l0.height

    def place(self, column: int, row: int) -> Place:
        """Return the patch in a column and row of the grid of patches, which do not overlap."""
        x_m, y_m = column * self._side, row * self._side
        return Place(self._digest, x_m * self._l0_per_m, y_m * self._l0_per_m, self._side, self._mpp)

    def cells(self) -> tuple[int, int]:
        """Return the columns and rows of the grid of patches.

        All patches lie inside the slide, except for less than a pixel at its right and lower edge.
        """
        width, height = self._grid.size_m
        return width // self._side, height // self._side

    def on_tissue(self, tissue: Tissue) -> list[Place]:
        """Return the patches of which at least `MIN_TISSUE` is tissue, row by row."""
        columns, rows = self.cells()
        whole = Box(0, 0, columns * _CELLS, rows * _CELLS)
        mask_HW = tissue.sample(whole, self.side_l0 / _CELLS)
        share_rc = mask_HW.reshape(rows, _CELLS, columns, _CELLS).mean(axis=(1, 3))
        return [self.place(int(column), int(row)) for row, column in np.argwhere(share_rc >= MIN_TISSUE)]

    def pixels(self, place: Place) -> NDArray[np.uint8]:
        """Return a patch as rgb_HWC. Pixels that lie only partly inside the slide are mirror images, as in a run.

        Raises SlideReadError if any part is unreadable, and the errors of `Slide.read`.
        """
        box_m = self._box_m(place)
        pixels = read_model_pixels(self._slide, self._grid, box_m)
        if pixels.unreadable_lv:
            x_l0, y_l0 = (round(value * self._l0_per_m) for value in (box_m.x, box_m.y))
            raise SlideReadError(
                f"{self.name}: pixels at ({x_l0}, {y_l0}) cannot be read; check the disk, or copy or scan the slide "
                "again"
            )
        mirror_outside(pixels.rgb_HWC, box_m, self._whole_m)
        return pixels.rgb_HWC

    def context(self, place: Place) -> NDArray[np.uint8]:
        """Return a patch and what lies around it, `CONTEXT` times as wide, as rgb_HWC. The patch is in the middle.

        Around the patch, what lies beyond the slide is white: mirror images, as the networks get them, would show the
        person tissue that does not exist. Unreadable pixels there are white, too. Raises SlideReadError if any part of
        the patch is unreadable, and the errors of `Slide.read`.
        """
        box_m = self._box_m(place)
        margin = (CONTEXT - 1) * self._side // 2
        around_m = Box(box_m.x - margin, box_m.y - margin, box_m.width + 2 * margin, box_m.height + 2 * margin)
        around = read_model_pixels(self._slide, self._grid, around_m)
        if around.unreadable_lv:
            # The parts that `Slide.read` leaves white depend on the box, so they may overlap a readable patch.
            around.rgb_HWC[box_m.slices(around_m)] = self.pixels(place)
        mirror_outside(around.rgb_HWC[box_m.slices(around_m)], box_m, self._whole_m)
        return around.rgb_HWC

    def thumbnail(self) -> NDArray[np.uint8]:
        """Return the whole slide as rgb_HWC, about `THUMBNAIL_PX` long."""
        return read_thumbnail(self._slide, self._slide.info.mpp * max(self.size_l0) / THUMBNAIL_PX).rgb_HWC

    def _box_m(self, place: Place) -> Box:
        x, y = round(place.x_l0 / self._l0_per_m), round(place.y_l0 / self._l0_per_m)
        return Box(x, y, self._side, self._side)

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


def shuffled(places: Iterable[Place], seed: int) -> list[Place]:
    """Return patches in a random order that the seed fixes. A patch that is left out does not move the others."""
    return sorted(places, key=lambda place: hashlib.sha256(f"order {seed} {place.id}".encode()).digest())


def round_robin(slides: Iterable[Iterable[T]]) -> Iterator[T]:
    """Yield the first item of each slide, then the second of each, and so on."""
    waiting = [iter(places) for places in slides]
    while waiting:
        still = []
        for places in waiting:
            for item in places:
                yield item
                still.append(places)
                break
        waiting = still
