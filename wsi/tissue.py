"""Find the tissue: a mask from a thumbnail, and a layer of everything that is not plain tissue."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box
from wsi.errors import SlideReadError
from wsi.fat import MIN_FAT_UM2, fat_inside, find_fat
from wsi.folds import find_folds
from wsi.left_out import Extent, LeftOut, extents
from wsi.masks import Mask, close, grow, pieces, thick, without_small
from wsi.pens import find_pens
from wsi.slide import Slide
from wsi.stain import Look, glass_color, has_look, looks
from wsi.thumbnail import read_thumbnail

MASK_MPP = 8.0
"""Micrometers per pixel of the mask, rounded to a whole multiple of a level's pixel."""

MIN_TISSUE_UM2 = 2_500.0
"""Smaller stained pieces are left out as fragments: 50 µm × 50 µm, the smallest group of cells that a tile shows."""

MIN_PALE_UM2 = 20_000.0
"""Faintly stained pieces without any clearly stained part must be at least as large: smaller ones are dirt."""

MAX_HOLE_UM2 = 10_000.0
"""Smaller holes (lumina, fat, tears) belong to the tissue around them."""

MIN_DUST_UM2 = 500.0
"""Smaller gray spots are noise."""

MIN_TINT_UM2 = 50_000.0
"""Smaller tinted areas are the blur around other objects."""

MAX_FOLD_SHARE = 0.02
"""A larger share of folds in the tissue gives a warning."""

MAX_COVERAGE = 0.75
"""A larger share of tissue on a whole slide gives a warning: glass may count as tissue."""

MIN_SLIDE_UM2 = 25e6
"""Smaller images are cutouts, which tissue may cover completely."""

MIN_STRUCTURE_UM2 = 20_000.0
"""If a slide has no tissue, but more structure than this, tissue may have been missed."""

MAX_BLACK_SHARE = 0.5
"""If a slide has no tissue, and a larger share of it is black, it may be a fluorescence slide."""

MAX_STRUCTURE_SHARE = 0.25
"""A larger area of left-out structure relative to the tissue gives a warning."""

MAX_UNREADABLE_SHARE = 0.01
"""A slide is refused if a larger share of its thumbnail is unreadable, because the missing part could be the tissue."""

_BORDER_SHARE = 0.5
"""Least share of smooth pixels in a gray piece at the edge of the image that the scanner left."""
_RIM_PX = 2
"""Width of the blur around borders, in which they have the colors of stains."""
_ROUGH_PX = 6
"""Width of the rim of borders that is not smooth."""
_PALE_PX = 6
"""Pale pieces without a part this thick are the borders of mountant and tinted glass."""
_STAINED_PX = 5
"""Clearly stained pixels that make a pale piece tissue."""


@dataclass(frozen=True)
class Tissue:
    """The tissue mask of a slide, over its bounds."""

    mask_HW: NDArray[np.bool_]
    left_out_HW: NDArray[np.uint8]
    """The `LeftOut` of each pixel, or 0. A fold may be in the mask too."""
    l0_per_px: float
    mpp: float
    warnings: tuple[str, ...]
    glass: tuple[float, float, float]
    """Color of the slide's glass."""
    fat_HW: NDArray[np.bool_]
    """The fat in the mask, whose bright cells are not holes."""

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything in this object that the map of a slide depends on."""
        values = hashlib.sha256(repr((self.mask_HW.shape, self.l0_per_px, self.mpp, self.glass)).encode())
        for layer_HW in (self.mask_HW, self.left_out_HW, self.fat_HW):
            values.update(layer_HW.tobytes())
        return values.hexdigest()

    @property
    def area_um2(self) -> float:
        """Return the area of the tissue in square micrometers."""
        return float(self.mask_HW.sum()) * self.mpp**2

    @property
    def left_out(self) -> Mapping[LeftOut, Extent]:
        """Return area and number of pieces of everything that is not plain tissue."""
        return extents(self.left_out_HW, self.mpp)

    @property
    def has_unrecognized_structure(self) -> bool:
        """Return whether the slide has no tissue, but structure that may be tissue, or a dark background."""
        left_out, area_um2 = self.left_out, self.mask_HW.size * self.mpp**2
        is_dark = left_out[LeftOut.BORDER].area_um2 > MAX_BLACK_SHARE * area_um2
        return not self.mask_HW.any() and (is_dark or structure_um2(left_out) > MIN_STRUCTURE_UM2)

    def sample(self, box_out: Box, l0_per_out: float) -> NDArray[np.bool_]:
        """Return the mask over a box of a map with `l0_per_out` level-0 pixels per pixel, as mask_HW.

        The mask is interpolated between the centers of its pixels, so that a finer map has smooth borders. Pixels
        outside the slide are not tissue.
        """
        scale = l0_per_out / self.l0_per_px
        height, width = self.mask_HW.shape
        inside_H = _inside(box_out.y, box_out.height, scale, height)
        inside_HW = inside_H[:, None] & _inside(box_out.x, box_out.width, scale, width)
        rows, row_weights = _positions(box_out.y, box_out.height, scale, height)
        columns, column_weights = _positions(box_out.x, box_out.width, scale, width)
        part_HW = self._around(rows, columns)
        if part_HW.all() or not part_HW.any():
            return np.asarray(inside_HW & part_HW[0, 0])
        upper, lower = part_HW[rows - rows[0]], part_HW[rows - rows[0] + 1]
        columns = columns - columns[0]
        left = upper[:, columns] * (1 - row_weights)[:, None] + lower[:, columns] * row_weights[:, None]
        right = upper[:, columns + 1] * (1 - row_weights)[:, None] + lower[:, columns + 1] * row_weights[:, None]
        value = left * (1 - column_weights) + right * column_weights
        return np.asarray(value >= 0.5) & inside_HW

    def nearest(self, layer_HW: NDArray[Any], box_out: Box, l0_per_out: float) -> NDArray[Any]:
        """Return a layer of the mask's shape over a box of a map, from the pixel of the layer at each center."""
        starts, counts = (box_out.y, box_out.x), (box_out.height, box_out.width)
        rows, columns = (
            np.clip(((np.arange(start, start + count) + 0.5) * l0_per_out / self.l0_per_px).astype(int), 0, size - 1)
            for start, count, size in zip(starts, counts, layer_HW.shape, strict=True)
        )
        return np.asarray(layer_HW[np.ix_(rows, columns)])

    def _around(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the mask from the first to one past the last of these rows and columns; outside it is False."""
        top, bottom, left, right = rows[0], rows[-1] + 2, columns[0], columns[-1] + 2
        part_HW = np.zeros((bottom - top, right - left), bool)
        inner_HW = self.mask_HW[max(0, top) : bottom, max(0, left) : right]
        y, x = max(0, -top), max(0, -left)
        part_HW[y : y + inner_HW.shape[0], x : x + inner_HW.shape[1]] = inner_HW
        return part_HW


class Found(NamedTuple):
    """What `detect_tissue` finds in a thumbnail."""

    mask_HW: Mask
    left_out_HW: NDArray[np.uint8]
    fat_HW: Mask
    glass: tuple[float, float, float]


def find_tissue(slide: Slide, *, exclude_folds: bool = False) -> Tissue:
    """Find the tissue of a slide on a thumbnail of about 8 µm per pixel. Deterministic.

    Everything that is not plain tissue is in the layer `left_out_HW`. Folds stay in the mask unless `exclude_folds`.
    Raises SlideReadError if more than `MAX_UNREADABLE_SHARE` of the thumbnail cannot be read.
    """
    thumbnail = read_thumbnail(slide, MASK_MPP)
    if thumbnail.unreadable_share > MAX_UNREADABLE_SHARE:
        raise SlideReadError(
            f"{slide.info.path.name}: {thumbnail.unreadable_share:.1%} of the thumbnail cannot be read (at most "
            f"{MAX_UNREADABLE_SHARE:.0%}); copy or scan the slide again"
        )
    mpp = slide.info.mpp * thumbnail.l0_per_px
    mask_HW, left_out_HW, fat_HW, glass = detect_tissue(thumbnail.rgb_HWC, mpp)
    whole = Box(0, 0, *mask_HW.shape[::-1])
    for box in thumbnail.unreadable_px:
        part = box.intersect(whole).slices(whole)
        left_out_HW[part][~mask_HW[part]] = LeftOut.UNREADABLE
    warnings = _warnings(mask_HW, left_out_HW, mpp, exclude_folds=exclude_folds)
    if exclude_folds:
        mask_HW &= left_out_HW != LeftOut.FOLD
    return Tissue(mask_HW, left_out_HW, thumbnail.l0_per_px, mpp, warnings, glass, fat_HW)


def detect_tissue(rgb_HWC: NDArray[np.uint8], mpp: float) -> Found:
    """Find tissue, folds included, in a thumbnail with pixels of `mpp` micrometers.

    Densities are relative to the glass of this slide (`wsi.stain`). Colored pixels are tissue; faintly colored ones
    need texture, and fat needs colored strands (`wsi.fat`). Pen ink has a color of pens and is smooth or even
    (`wsi.pens`). Gray objects are dust. Large dark ones are not fat; smaller ones may lie on it.
    """
    glass = glass_color(rgb_HWC)
    looks_HW = looks(rgb_HWC, glass)
    left_out_HW = np.zeros(looks_HW.shape, np.uint8)
    left_out_HW[find_pens(rgb_HWC, looks_HW, glass, mpp)] = LeftOut.PEN
    _mark_gray(left_out_HW, looks_HW, mpp)
    other_HW = (left_out_HW == LeftOut.PEN) | (left_out_HW == LeftOut.BORDER)
    mask_HW, fragment_HW = _tissue(looks_HW, other_HW, mpp)
    colored_HW = has_look(looks_HW, Look.STAINED | Look.PALE)
    dark_HW = has_look(looks_HW, Look.DARK) & (left_out_HW == LeftOut.DUST)
    not_fat_HW = other_HW | without_small(close(dark_HW), MIN_FAT_UM2 / mpp**2)
    fat_HW = find_fat(has_look(looks_HW, Look.TEXTURED), colored_HW, mask_HW, not_fat_HW, mpp)
    if fat_HW.any():
        mask_HW = _without_holes(mask_HW | fat_HW, mpp) & ~other_HW
    fat_HW = fat_inside(colored_HW, mask_HW, mpp)
    del other_HW, not_fat_HW, dark_HW, colored_HW
    left_out_HW[mask_HW] = 0
    left_out_HW[fragment_HW & ~mask_HW & (left_out_HW == 0)] = LeftOut.FRAGMENT
    tinted_HW = has_look(looks_HW, Look.TINTED) & ~mask_HW & (left_out_HW == 0)
    left_out_HW[without_small(tinted_HW, MIN_TINT_UM2 / mpp**2)] = LeftOut.TINT
    left_out_HW[find_folds(rgb_HWC, mask_HW, glass, mpp)] = LeftOut.FOLD
    return Found(mask_HW, left_out_HW, fat_HW, glass)


def structure_um2(left_out: Mapping[LeftOut, Extent]) -> float:
    """Return the area of the left-out kinds that may be tissue."""
    return sum(extent.area_um2 for kind, extent in left_out.items() if kind.is_structure)


def _mark_gray(left_out_HW: NDArray[np.uint8], looks_HW: NDArray[np.uint8], mpp: float) -> None:
    """Mark the gray pieces: smooth ones at the edge of the image as the scanner's border, the others as dust.

    Parts of a border that are larger than a hole and far from its smooth parts are gray objects that touch it.
    """
    found = pieces(has_look(looks_HW, Look.GRAY) & (left_out_HW == 0))
    sizes = found.sizes()
    large = sizes >= MIN_DUST_UM2 / mpp**2
    smooth = found.counts(has_look(looks_HW, Look.SMOOTH)) >= _BORDER_SHARE * sizes
    border_HW = found.chosen(large & smooth & found.at_the_edge())
    left_out_HW[found.chosen(large)] = LeftOut.DUST
    smooth_HW = thick(border_HW & has_look(looks_HW, Look.SMOOTH), _RIM_PX)
    border_HW &= ~without_small(border_HW & ~grow(smooth_HW, _ROUGH_PX), MAX_HOLE_UM2 / mpp**2)
    if border_HW.any():
        left_out_HW[grow(border_HW, _RIM_PX) & ((looks_HW & ~(Look.TEXTURED | Look.SMOOTH)) != 0)] = LeftOut.BORDER


def _tissue(looks_HW: NDArray[np.uint8], other_HW: Mask, mpp: float) -> tuple[Mask, Mask]:
    """Return the tissue, and the stained pieces that are too small. `other_HW` is never tissue."""
    stained_HW = has_look(looks_HW, Look.STAINED) & ~other_HW
    pale_HW = has_look(looks_HW, Look.PALE) & ~other_HW
    core_HW = thick(close(pale_HW), _PALE_PX)
    found = pieces(close(stained_HW | pale_HW) & ~other_HW)
    del pale_HW
    sizes, stained, has_pale_core = found.sizes(), found.counts(stained_HW), found.counts(core_HW) > 0
    is_stained = stained >= _STAINED_PX
    keep = is_stained & (sizes >= MIN_TISSUE_UM2 / mpp**2) | has_pale_core & (sizes >= MIN_PALE_UM2 / mpp**2)
    mask_HW, fragment_HW = found.chosen(keep), found.chosen(~keep & (stained > 0))
    del found, core_HW, stained_HW
    return _without_holes(mask_HW, mpp) & ~other_HW, fragment_HW


def _without_holes(mask_HW: Mask, mpp: float) -> Mask:
    return ~without_small(~mask_HW, MAX_HOLE_UM2 / mpp**2)


def _warnings(mask_HW: Mask, left_out_HW: NDArray[np.uint8], mpp: float, *, exclude_folds: bool) -> tuple[str, ...]:
    left_out = extents(left_out_HW, mpp)
    tissue_um2 = float(mask_HW.sum()) * mpp**2
    black_um2 = left_out[LeftOut.BORDER].area_um2
    scanned_um2 = mask_HW.size * mpp**2 - black_um2
    structure, fold = structure_um2(left_out), left_out[LeftOut.FOLD].area_um2
    parts = ", ".join(
        f"{kind.title} {extent.area_um2 / 1e6:.2f} mm²"
        for kind, extent in left_out.items()
        if kind.is_structure and extent.pieces
    )
    warnings = []
    if left_out[LeftOut.UNREADABLE].pieces:
        unread_mm2 = left_out[LeftOut.UNREADABLE].area_um2 / 1e6
        warnings.append(
            f"{unread_mm2:.2f} mm² could not be read when the tissue was searched for; tissue there is missing"
        )
    if not tissue_um2 and structure > MIN_STRUCTURE_UM2:
        warnings.append(f"no tissue was recognized, but the slide has structure ({parts}); look at the slide")
    elif tissue_um2 and structure > MAX_STRUCTURE_SHARE * tissue_um2:
        warnings.append(f"much was left out beside the tissue ({parts}); check that none of it is tissue")
    if not tissue_um2 and black_um2 > MAX_BLACK_SHARE * (black_um2 + scanned_um2):
        share = black_um2 / (black_um2 + scanned_um2)
        warnings.append(f"no tissue was recognized, and {share:.0%} of the slide is black; is it a bright-field slide?")
    if tissue_um2 > MAX_COVERAGE * scanned_um2 and scanned_um2 > MIN_SLIDE_UM2:
        share = tissue_um2 / scanned_um2
        warnings.append(f"tissue covers {share:.0%} of the slide; check that glass does not count as tissue")
    if fold > MAX_FOLD_SHARE * tissue_um2:
        place = "are left out" if exclude_folds else "stay in the map; --exclude-folds leaves them out"
        warnings.append(f"folds cover {fold / tissue_um2:.0%} of the tissue and {place}")
    return tuple(warnings)


def _positions(start: int, count: int, scale: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the mask's pixel before the center of each map pixel, from -1 to size - 1, and the distance from it."""
    centers = (np.arange(start, start + count) + 0.5) * scale - 0.5
    whole = np.floor(centers)
    return np.clip(whole.astype(np.int64), -1, size - 1), (centers - whole).astype(np.float32)


def _inside(start: int, count: int, scale: float, size: int) -> NDArray[np.bool_]:
    centers = (np.arange(start, start + count) + 0.5) * scale
    return np.asarray((centers >= 0) & (centers < size))
