"""The map that both networks start from, computed once for each pixel of an image.

The first stages of a network produce its largest maps but depend only on pixels nearby. So they run on small windows of
an image instead of on canvases. Windows overlap less than canvases with their margins do, and the maps of windows fit
in a processor's cache. A canvas then takes its part of the map.

Shape suffixes: H and W an image, C channels, h and w its map at stride 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from models.backbone_windows import Place
from models.runtimes import CONTEXT
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


def spans(length: int, side: int) -> Iterator[Span]:
    """Yield windows of `side` pixels that cover an axis of `length` pixels, both multiples of 16.

    The used parts of the windows cover the axis without gaps or overlaps. They lie at least `CONTEXT` pixels from the
    ends of their windows, except at the ends of the axis. An axis shorter than `side` has one window.
    """
    step, used = side - 2 * CONTEXT, 0
    for nominal in range(0, max(1, length - 2 * CONTEXT), step):
        # The last window ends with the image.
        start = max(0, min(nominal, length - side))
        stop = min(length, start + side)
        last = length if stop == length else stop - CONTEXT
        yield Span(start, stop, used, last)
        used = last


def fine_map(
    first: Callable[[Tensor], Tensor],
    rgb_HWC: Tensor,
    places: Sequence[Place],
    side: int,
    each: Callable[[Callable[[Window], None], Sequence[Window]], object] = lambda run, windows: list(map(run, windows)),
) -> Tensor:
    """Return the map (C, h, w) of an image (H, W, 3) from `first`: (1, H, W, 3) uint8 -> (1, C, h, w).

    Needs at least one place. Values outside `places` are undefined. Inside, they equal those of the whole image if the
    padding of `first` reaches at most `CONTEXT` pixels. `each` calls a function for each window, in any order.
    """
    rows, columns = (list(spans(length, side)) for length in rgb_HWC.shape[:2])
    start, *others = (
        window
        for window in product(rows, columns)
        if any(_overlap(window[0], place[0]) and _overlap(window[1], place[1]) for place in places)
    )

    def computed(window: Window) -> Tensor:
        return first(rgb_HWC[None, *(slice(span.start, span.stop) for span in window)])[0]

    def store(window: Window, window_Chw: Tensor) -> None:
        part = window_Chw[:, *(_cells(span, span.start) for span in window)]
        found_Chw[:, *map(_cells, window)] = part

    # The map of the first window gives the number of channels.
    start_Chw = computed(start)
    sides = (length // NATIVE_STRIDE for length in rgb_HWC.shape[:2])
    found_Chw = start_Chw.new_empty((len(start_Chw), *sides))
    store(start, start_Chw)
    each(lambda window: store(window, computed(window)), others)
    return found_Chw


def part_of(map_Chw: Tensor, place: Place) -> Tensor:
    """Return the part of a map at stride 4 that belongs to a place of its image."""
    rows, columns = (slice(axis.start // NATIVE_STRIDE, axis.stop // NATIVE_STRIDE) for axis in place)
    return map_Chw[:, rows, columns]


def _overlap(span: Span, axis: slice) -> bool:
    return bool(span.first < axis.stop and axis.start < span.last)


def _cells(span: Span, origin: int = 0) -> slice:
    return slice((span.first - origin) // NATIVE_STRIDE, (span.last - origin) // NATIVE_STRIDE)
