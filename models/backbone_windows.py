"""The windows in which a shared backbone runs: canvases with less context on sides toward other cores.

`models.deep_map` joins their features. This module is separate so that a plan does not import PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from models.card import SegmenterCard

Place = tuple[slice, slice]
"""Rows and columns of an image that a canvas takes. Starts and stops are multiples of 16."""

OVERLAP = 32
"""Pixels that the backbone computes around a core on a side that touches another core. For other values, see
docs/decisions/0016-deep-features-of-a-block.md; for this one, docs/decisions/0017-large-windows.md."""

ALONE = 64
"""The same on a side that touches no other core. Small pieces of tissue have only such sides."""

RING = 32
"""Pixels around a canvas whose features the segmenter reads too: see `models.segmenter.CoreDecoder`."""


def runs_in_windows(card: SegmenterCard) -> bool:
    """Return whether the networks share a backbone that is known to run in windows, its first stages in small ones.

    A few other backbones run in windows too. Plans count them as if each canvas passed the networks as a whole.
    """
    return card.shared_backbone and re.search(r"efficientnet_lite[0-3]$", card.encoder) is not None


def window_places(places: Sequence[Place], margin: int, block: Place | None) -> list[Place]:
    """Return the windows in which the backbone runs for canvases with this margin, which are places of one image.

    `block` contains all cores, and cores of other images can follow beyond it; None stands for the cores' bounding box.
    A core that touches the edge of the block has all that the segmenter reads on this side of its window. All other
    sides have `OVERLAP` or `ALONE` pixels, and no more than the segmenter reads.
    """
    most = margin + RING
    cores = [[(side.start + margin, side.stop - margin) for side in place] for place in places]
    if block is None:
        edges = [(min(core[axis][0] for core in cores), max(core[axis][1] for core in cores)) for axis in (0, 1)]
    else:
        edges = [(side.start, side.stop) for side in block]

    def around(core: list[tuple[int, int]], axis: int, end: int) -> int:
        if core[axis][end] == edges[axis][end]:
            return most
        start, stop = core[1 - axis]
        beside = [other[1 - axis] for other in cores if other[axis][1 - end] == core[axis][end]]
        return min(most, OVERLAP if any(first < stop and start < last for first, last in beside) else ALONE)

    return [
        (
            slice(core[0][0] - around(core, 0, 0), core[0][1] + around(core, 0, 1)),
            slice(core[1][0] - around(core, 1, 0), core[1][1] + around(core, 1, 1)),
        )
        for core in cores
    ]
