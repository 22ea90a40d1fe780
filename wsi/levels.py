"""Choose the level of a pyramid to read from."""

from __future__ import annotations

from collections.abc import Sequence

MPP_TOLERANCE = 0.02
"""Relative difference up to which two pixel sizes count as equal. Scanners know their pixel size no better, and whole
factors need no interpolation (docs/decisions/0002-resolution.md)."""

SHAPE_TOLERANCE_PX = 4
"""Pixels by which the shorter side of a level may differ from its share of the slide. Scanners round the sides of each
level to whole pixels, some of them in several steps, which adds up to less than this."""

SHAPE_TOLERANCE = 0.02
"""Share of the shorter side by which it may differ. Some scanners pad their levels or cut them at whole tiles."""


def levels_of_one_shape(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the number of levels before the first one whose shape differs from that of level 0.

    `sizes` are (width, height) of the levels. Some libraries count every tiled image of a file as a level, including
    pictures of the label or of the whole glass.
    """
    longer = 0 if sizes[0][0] >= sizes[0][1] else 1
    shorter = 1 - longer
    for number, size in enumerate(sizes):
        expected = sizes[0][shorter] * size[longer] / sizes[0][longer]
        if abs(size[shorter] - expected) > max(SHAPE_TOLERANCE_PX, SHAPE_TOLERANCE * expected):
            return number
    return len(sizes)


def pick_level(downsamples: Sequence[float], wanted: float) -> int:
    """Return the coarsest level that is at least as fine as `wanted`, or the finest level if none is.

    `downsamples` are the level-0 pixels per pixel of each level, in any order. `wanted` has the same unit. A level that
    is coarser than `wanted` by up to `MPP_TOLERANCE` counts as fine enough.
    """
    fine_enough = [i for i, downsample in enumerate(downsamples) if downsample <= wanted * (1 + MPP_TOLERANCE)]
    if not fine_enough:
        return min(range(len(downsamples)), key=lambda i: downsamples[i])
    return max(fine_enough, key=lambda i: downsamples[i])
