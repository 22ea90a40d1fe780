"""The parts of a core in which the decoder of a segmenter runs.

The decoder needs only the pixels around a part, so parts do not change its logits, except for rounding: see
`reads_beyond`. On a CPU, the maps of small parts fit in the cache. Parts have few sizes, so OpenVINO can keep its
kernels for each of them. Parts in which the gate leaves at most one class for each pixel are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor

from models.backbone_windows import Place

PART_SIDE = 256
"""Side of a part in pixels. A decoder with 128 channels takes 0.032 s of processor time per megapixel with 256 px, and
0.040 s with 1,024 px. Smaller parts compute too many pixels twice (0.043 s with 128 px)."""


def parts_of(core: Sequence[int], side: int | None) -> list[Place]:
    """Return the parts of a core of this height and width, in its pixels; None as the side returns the whole core."""
    rows, columns = (
        [slice(start, min(length, start + (side or length))) for start in range(0, length, side or length)]
        for length in core
    )
    return list(product(rows, columns))


def reads_beyond(cells: int, rates: Sequence[int]) -> bool:
    """Return whether an ASPP with these dilation rates reads more cells of the deep map around a part than there are.

    Then it would mirror features at the edges of each part, and the edges would show.
    """
    return max(rates) > cells - 1  # the separable convolution after the ASPP reads one more cell


def cut(map_Chw: Tensor, part: Place, around: int, stride: int) -> Tensor:
    """Return what a part needs of a map (..., h, w) with `stride` pixels per cell, `around` pixels on all sides.

    The map has the whole core and `around` pixels on all sides.
    """
    rows, columns = (slice(side.start // stride, (side.stop + 2 * around) // stride) for side in part)
    return map_Chw[..., rows, columns]
