"""Operations on masks of a thumbnail: closing, growing, and connected pieces. Each needs a few bytes per pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

WORK_PX = 1 << 19
"""Pixels of the thumbnail that are processed at a time in steps that need more than a few bytes per pixel."""

PATCH_ROWS = 64
"""Rows of a patch. With few rows, patches skip much of an image that is mostly empty."""

_PATCH_GAP = 64
"""Patches with fewer columns between them are joined: a separate patch would take longer than these columns."""

_CLOSE_PX = 2
"""Steps out, and then in, of `close`."""


class Pieces(NamedTuple):
    """The 4-connected pieces of a mask. Piece k has label k; label 0 is outside."""

    labels_HW: NDArray[np.int32]
    number: int

    def sizes(self) -> NDArray[np.int64]:
        """Return the pixels of each label."""
        return self.counts(None)

    def counts(self, mask_HW: Mask | None) -> NDArray[np.int64]:
        """Return how many pixels of each label are in a mask; None counts all of them."""
        counts = np.zeros(self.number + 1, np.int64)
        # In strips, because counting makes copies of eight bytes per pixel.
        for rows in strips(self.labels_HW.shape):
            labels_HW = self.labels_HW[rows]
            # The count of label 0, which most pixels have, is found by subtraction.
            labels_N = labels_HW[labels_HW > 0 if mask_HW is None else mask_HW[rows]]
            counts += np.bincount(labels_N, minlength=self.number + 1)
        if mask_HW is None:
            counts[0] = self.labels_HW.size - counts.sum()
        return counts

    def chosen(self, keep: NDArray[np.bool_]) -> Mask:
        """Return the mask of the pieces whose entry in `keep` is True. Label 0 is never chosen."""
        keep = keep.copy()
        keep[0] = False
        chosen_HW = np.empty(self.labels_HW.shape, bool)
        for rows in strips(chosen_HW.shape):
            # Labels are valid indices. With mode="clip", take does not check them, which halves the time.
            keep.take(self.labels_HW[rows], out=chosen_HW[rows], mode="clip")
        return chosen_HW

    def at_the_edge(self) -> NDArray[np.bool_]:
        """Return for each label whether it touches the edge of the image."""
        touching = np.zeros(self.number + 1, bool)
        for line in (self.labels_HW[0], self.labels_HW[-1], self.labels_HW[:, 0], self.labels_HW[:, -1]):
            touching[line] = True
        return touching


def pieces(mask_HW: Mask) -> Pieces:
    """Return the 4-connected pieces of a mask."""
    labels_HW, number = ndimage.label(mask_HW)
    return Pieces(labels_HW, int(number))


def without_small(mask_HW: Mask, min_px: float) -> Mask:
    """Return a mask without its pieces of fewer than `min_px` pixels."""
    found = pieces(mask_HW)
    return found.chosen(found.sizes() >= min_px)


def strips(shape: tuple[int, ...]) -> list[slice]:
    """Return the rows of an image in strips of about `WORK_PX` pixels."""
    rows = max(1, WORK_PX // shape[1])
    return [slice(top, min(top + rows, shape[0])) for top in range(0, shape[0], rows)]


def patches(mask_HW: Mask, reach: int = 0) -> Iterator[tuple[slice, slice]]:
    """Yield boxes, as rows and columns, that contain all pixels within `reach` rows and columns of the mask's pixels.

    They do not overlap, and have at most `PATCH_ROWS` rows.
    """
    height, width = mask_HW.shape
    for top in range(0, height, PATCH_ROWS):
        bottom = min(top + PATCH_ROWS, height)
        (found,) = np.nonzero(mask_HW[max(0, top - reach) : bottom + reach].any(axis=0))
        for run in np.split(found, np.flatnonzero(np.diff(found) > 2 * reach + _PATCH_GAP) + 1):
            if run.size:
                yield slice(top, bottom), wider(slice(int(run[0]), int(run[-1]) + 1), reach, width)


def wider(part: slice, reach: int, length: int) -> slice:
    """Return a part of an axis of this length, extended by up to `reach` pixels on both sides."""
    return slice(max(0, part.start - reach), min(length, part.stop + reach))


def close(mask_HW: Mask) -> Mask:
    """Return a mask with gaps of up to four pixels closed. The mask continues beyond the edges of the image."""
    closed_HW = np.empty_like(mask_HW)
    for part_HW, rows, inner in _padded(mask_HW, 2 * _CLOSE_PX):
        closed_HW[rows] = _smaller(_larger(part_HW, _CLOSE_PX), _CLOSE_PX)[inner]
    return closed_HW


def grow(mask_HW: Mask, px: int) -> Mask:
    """Return a mask grown by a diamond of this radius."""
    grown_HW = np.empty_like(mask_HW)
    for part_HW, rows, inner in _padded(mask_HW, px):
        grown_HW[rows] = _larger(part_HW, px)[inner]
    return grown_HW


def shrink(mask_HW: Mask, px: int) -> Mask:
    """Return a mask shrunk by a diamond of this radius."""
    return ~grow(~mask_HW, px)


def thick(mask_HW: Mask, px: int) -> Mask:
    """Return the parts of a mask into which a diamond of this radius fits (morphological opening)."""
    opened_HW = np.empty_like(mask_HW)
    for part_HW, rows, inner in _padded(mask_HW, 2 * px):
        opened_HW[rows] = _larger(_smaller(part_HW, px), px)[inner]
    return opened_HW


def one_px_larger(mask_HW: Mask) -> Mask:
    """Return a mask extended by the four neighbors of each of its pixels."""
    larger_HW = mask_HW.copy()
    larger_HW[1:] |= mask_HW[:-1]
    larger_HW[:-1] |= mask_HW[1:]
    larger_HW[:, 1:] |= mask_HW[:, :-1]
    larger_HW[:, :-1] |= mask_HW[:, 1:]
    return larger_HW


def _larger(mask_HW: Mask, px: int) -> Mask:
    # Shifted masks take a tenth of the time of ndimage.binary_dilation.
    for _ in range(px):
        mask_HW = one_px_larger(mask_HW)
    return mask_HW


def _smaller(mask_HW: Mask, px: int) -> Mask:
    return ~_larger(~mask_HW, px)


def _padded(mask_HW: Mask, reach: int) -> Iterator[tuple[Mask, slice, tuple[slice, slice]]]:
    """Yield strips with `reach` pixels around them, the rows of each, and the place of these rows in the strip."""
    height, width = mask_HW.shape
    for rows in strips(mask_HW.shape):
        top, bottom = max(0, rows.start - reach), min(height, rows.stop + reach)
        above, below = reach - (rows.start - top), reach - (bottom - rows.stop)
        # Without padding, operations that shrink would erode the mask along the slide's edge.
        part_HW = np.pad(mask_HW[top:bottom], ((above, below), (reach, reach)), mode="edge")
        yield part_HW, rows, (slice(reach, reach + rows.stop - rows.start), slice(reach, reach + width))
