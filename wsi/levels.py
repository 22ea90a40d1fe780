"""Choose the level of a pyramid to read from."""

from __future__ import annotations

from collections.abc import Sequence

MPP_TOLERANCE = 0.02
"""Relative difference up to which two pixel sizes count as equal. Scanners know their pixel size no better, and whole
factors need no interpolation (docs/decisions/0002-resolution.md)."""


def pick_level(downsamples: Sequence[float], wanted: float) -> int:
    """Return the coarsest level that is at least as fine as `wanted`, or the finest level if none is.

    `downsamples` are the level-0 pixels per pixel of each level, in any order. `wanted` has the same unit. A level that
    is coarser than `wanted` by up to `MPP_TOLERANCE` counts as fine enough.
    """
    fine_enough = [i for i, downsample in enumerate(downsamples) if downsample <= wanted * (1 + MPP_TOLERANCE)]
    if not fine_enough:
        return min(range(len(downsamples)), key=lambda i: downsamples[i])
    return max(fine_enough, key=lambda i: downsamples[i])
