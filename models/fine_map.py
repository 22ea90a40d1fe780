"""The map that both networks start from, computed once for each pixel of an image.

The first stages of a network produce its largest maps but depend only on pixels nearby. So they run on small windows of
an image instead of on canvases. Windows overlap less than canvases with their margins do, and the maps of windows fit
in a processor's cache. A canvas then takes its part of the map.

Shape suffixes: H and W an image, C channels, h and w its map at stride 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from models.backbone_windows import Place
from models.segmenter import NATIVE_STRIDE


class Span(NamedTuple):
    """A window along one axis of an image, in pixels."""

    start: int
    stop: int
    first: int
    """First pixel whose features are taken from this window."""
    last: int
    """The pixel after the last of these pixels."""


Window = tuple[Span, Span]
"""A window along both axes: rows and columns."""


def spans(needed: Iterable[slice], length: int, side: int, context: int) -> list[Span]:
    """Return windows of `side` pixels that cover the needed parts of an axis.

    All starts, stops and lengths are multiples of 4 pixels, and `side` is more than twice `context`. The axis has
    `length` pixels; parts beyond it do not count. The used parts of the windows do not overlap and contain the needed
    parts. They lie at least `context` pixels from the ends of their windows, except at the ends of the axis. An axis
    shorter than `side` has one window.
    """
    found: list[Span] = []
    used = 0
    for part in sorted(needed, key=lambda part: part.start):
        used = max(used, part.start)
        while used < min(part.stop, length):
            start = max(0, min(used - context, length - side))
            stop = min(length, start + side)
            last = length if stop == length else stop - context
            found.append(Span(start, stop, used, last))
            used = last
    return found


def windows(size: Sequence[int], places: Sequence[Place], side: int, context: int) -> list[Window]:
    """Return windows that cover `places` in an image of `size` (height, width). See `spans`."""
    found = []
    for rows in spans([place[0] for place in places], size[0], side, context):
        beside = [place[1] for place in places if place[0].start < rows.last and rows.first < place[0].stop]
        found += [(rows, columns) for columns in spans(beside, size[1], side, context)]
    return found


def fine_map(
    first: Callable[[Tensor], Tensor],
    rgb_HWC: Tensor,
    places: Sequence[Place],
    side: int,
    context: int,
    each: Callable[[Callable[[Window], None], Sequence[Window]], object] = lambda run, items: list(map(run, items)),
) -> Tensor:
    """Return the map (C, h, w) of an image (H, W, 3) from `first`: (1, H, W, 3) uint8 -> (1, C, h, w).

    Needs at least one place. Values outside `places` are undefined. Inside, they equal those of the whole image, up to
    rounding, if the padding of `first` reaches at most `context` pixels. Each side of a window has `side` pixels, or
    the length of the image if that is shorter. `each` calls a function for each window, in any order.
    """
    start, *others = windows(rgb_HWC.shape[:2], places, side, context)

    def computed(window: Window) -> Tensor:
        return first(rgb_HWC[None, *(slice(span.start, span.stop) for span in window)])[0]

    def store(window: Window, window_Chw: Tensor) -> None:
        part = window_Chw[:, *(_cells(span, span.start) for span in window)]
        found_Chw[:, *map(_cells, window)] = part

    # The map of the first window gives the number of channels.
    start_Chw = computed(start)
    shape = (length // NATIVE_STRIDE for length in rgb_HWC.shape[:2])
    found_Chw = start_Chw.new_empty((len(start_Chw), *shape))
    store(start, start_Chw)
    each(lambda window: store(window, computed(window)), others)
    return found_Chw


def part_of(map_Chw: Tensor, place: Place) -> Tensor:
    """Return the part of a map at stride 4 that belongs to a place of its image."""
    rows, columns = (slice(axis.start // NATIVE_STRIDE, axis.stop // NATIVE_STRIDE) for axis in place)
    return map_Chw[:, rows, columns]


def _cells(span: Span, origin: int = 0) -> slice:
    return slice((span.first - origin) // NATIVE_STRIDE, (span.last - origin) // NATIVE_STRIDE)
