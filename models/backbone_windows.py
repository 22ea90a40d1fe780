"""The windows in which a backbone runs that both networks share: canvases with less context where other cores lie.

`models.deep_map` joins their features. This module is apart from it because a plan needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[slice, slice]
"""Rows and columns of an image that a canvas takes. Starts and stops are multiples of 16."""

OVERLAP = 48
"""Pixels that the backbone computes around a core, instead of the model's margin, except at the border of all cores,
where cores of other images can follow. docs/decisions/0016-deep-features-of-a-block.md compares it with other values.
"""


def window_places(places: Sequence[Place], margin: int) -> list[Place]:
    """Return the windows in which the backbone runs for canvases with this margin, which are places of one image."""
    border = [
        (min(place[axis].start for place in places), max(place[axis].stop for place in places)) for axis in (0, 1)
    ]
    less = margin - min(OVERLAP, margin)

    def window(side: slice, first: int, last: int) -> slice:
        return slice(side.start + (less if side.start > first else 0), side.stop - (less if side.stop < last else 0))

    return [(window(place[0], *border[0]), window(place[1], *border[1])) for place in places]
