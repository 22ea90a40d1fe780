"""Continue an image beyond its edges by its mirror images, as the training images of the networks are.

Shape suffixes: H and W an image, C color channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box


def mirrored(start: int, side: int, length: int) -> NDArray[np.int64]:
    """Return the pixel of an image of this length at each of the positions [start, start + side)."""
    position = (start + np.arange(side)) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)


def with_sources(box: Box, inside: Box, multiple: int = 1) -> Box:
    """Return the box, enlarged to the left and to the top by what `mirror_outside` needs beyond its other two edges.

    That is more than the box has if most of it lies outside. If the box is enlarged, its corner is at a multiple of
    `multiple`.
    """
    x, y = (
        start if first >= start else first // multiple * multiple
        for start, first in (
            (box.x, max(inside.x, 2 * inside.right - box.right)),
            (box.y, max(inside.y, 2 * inside.bottom - box.bottom)),
        )
    )
    return Box(x, y, box.right - x, box.bottom - y)


def mirror_outside(canvas_HWC: NDArray[np.uint8], canvas: Box, inside: Box) -> None:
    """Fill the part of a canvas outside the box `inside` with mirror images of the part inside, in place.

    Both boxes have the same frame. A canvas without a pixel inside stays as it is.
    """
    common = canvas.intersect(inside)
    if not (common.width and common.height):
        return
    left, top = common.x - canvas.x, common.y - canvas.y
    columns = left + mirrored(-left, canvas.width, common.width)
    rows = top + mirrored(-top, canvas.height, common.height)
    # Columns first: rows then copy whole rows, corners included. Only what lies outside is written.
    for beyond in (slice(0, left), slice(left + common.width, canvas.width)):
        canvas_HWC[:, beyond] = canvas_HWC[:, columns[beyond]]
    for beyond in (slice(0, top), slice(top + common.height, canvas.height)):
        canvas_HWC[beyond] = canvas_HWC[rows[beyond]]
