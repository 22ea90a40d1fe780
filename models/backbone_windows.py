"""The windows in which a shared backbone runs: canvases with less context on sides toward other cores.

`models.deep_map` joins their features. This module is separate so that a plan does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[slice, slice]
"""Rows and columns of an image that a canvas takes. Starts and stops are multiples of 16."""

OVERLAP = 48
"""Pixels that the backbone computes around a core on sides on which other cores of the image can follow.
docs/decisions/0016-deep-features-of-a-block.md compares it with other values."""

RING = 32
"""Pixels around a canvas whose features the segmenter reads too: see `models.segmenter.CoreDecoder`."""


def window_places(places: Sequence[Place], margin: int) -> list[Place]:
    """Return the windows in which the backbone runs for canvases with this margin, which are places of one image.

    At the border of all cores, where cores of other images can follow, a window contains all that the segmenter reads.
    The border is that of the cores' bounding box. All other sides have `OVERLAP` pixels, even without a neighboring
    core.
    """
    first, last = (
        [pick(getattr(place[axis], bound) for place in places) for axis in (0, 1)]
        for bound, pick in (("start", min), ("stop", max))
    )
    less = margin - OVERLAP

    def window(side: slice, axis: int) -> slice:
        return slice(
            side.start + (less if side.start > first[axis] else -RING),
            side.stop - (less if side.stop < last[axis] else -RING),
        )

    return [(window(place[0], 0), window(place[1], 1)) for place in places]
