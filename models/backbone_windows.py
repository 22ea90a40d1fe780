"""The windows in which a shared backbone runs: canvases with less context on sides toward other cores.

`models.deep_map` joins their features. This module is separate so that a plan does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[slice, slice]
"""Rows and columns of an image that a canvas takes. Starts and stops are multiples of 16."""

OVERLAP = 32
"""Pixels that the backbone computes around a core inside a block. For other values, see
docs/decisions/0016-deep-features-of-a-block.md; for this one, docs/decisions/0017-large-windows.md."""

RING = 32
"""Pixels around a canvas whose features the segmenter reads too: see `models.segmenter.CoreDecoder`."""


def window_places(places: Sequence[Place], margin: int, block: Place | None) -> list[Place]:
    """Return the windows in which the backbone runs for canvases with this margin, which are places of one image.

    `block` contains all cores, and cores of other images can follow beyond it; None stands for the cores' bounding box.
    A core that touches the edge of the block has all that the segmenter reads on this side of its window. All other
    sides have `OVERLAP` pixels, with or without a neighboring core.
    """
    less = margin - OVERLAP

    def windows(axis: int) -> list[slice]:
        sides = [slice(place[axis].start + margin, place[axis].stop - margin) for place in places]
        edges = slice(min(s.start for s in sides), max(s.stop for s in sides)) if block is None else block[axis]
        return [
            slice(
                core.start - margin + (less if core.start > edges.start else -RING),
                core.stop + margin - (less if core.stop < edges.stop else -RING),
            )
            for core in sides
        ]

    return list(zip(windows(0), windows(1), strict=True))
