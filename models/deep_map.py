"""The deep features of all canvases of an image, for networks that share their whole backbone.

Near the edge of a canvas, features are computed with little context, so they differ from those of the neighboring
canvas. The segmenter reads features from the whole margin around a core. If each canvas used only its own features,
borders of canvases would show in the probabilities (docs/decisions/0016-deep-features-of-a-block.md). Therefore, the
features of all canvases are joined into one map, which each canvas reads. Inside a core, the map has the features
computed for that core. The backbone then needs less context around a core than the segmenter reads.

Shape suffixes: N canvases, D channels, T cells of all windows, H and W the joined map, h and w a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.backbone_windows import RING, Place, window_places
from models.segmenter import AROUND


class DeepWindows(NamedTuple):
    """The windows in which the backbone runs, and the features that each canvas takes from them."""

    places: list[Place]
    """The window of each canvas, in pixels of the image."""
    cores: list[Place]
    """The core of each canvas and the pixels around it that the decoder reads, in pixels of the window."""
    batches: list[list[int]]
    """Windows of one size that pass the backbone together. Their cells are numbered in this order, row by row."""
    cells: list[NDArray[np.int32]]
    """For each canvas and its `RING`, the number of the cell whose features it takes at each place, (h, w)."""


def joined_windows(
    places: Sequence[Place], size: Sequence[int], margin: int, stride: int, batch_size: int, block: Place | None = None
) -> DeepWindows:
    """Return the windows for canvases that are places of one image of this height and width, in pixels.

    A cell has `stride` pixels. Windows end at the edges of the image. For `block`, see `window_places`.

    A cell's features come from the canvas in whose core it lies, or else from the window whose edge is farthest from
    the cell, or else from the nearest cell that has some. The order of the canvases does not matter.
    """
    windows: list[Place] = [
        (_clipped(rows, size[0]), _clipped(columns, size[1])) for rows, columns in window_places(places, margin, block)
    ]
    batches = batches_of([(_length(rows), _length(columns)) for rows, columns in windows], batch_size)
    numbers = _numbers(windows, batches, stride)
    origin = [min(place[axis].start for place in places) - RING for axis in (0, 1)]
    sides = [max(place[axis].stop for place in places) + RING for axis in (0, 1)]
    cells_HW = np.full([(side - first) // stride for side, first in zip(sides, origin, strict=True)], -1, np.int32)

    def cells_of(place: Place, more: int = 0) -> Place:
        rows, columns = (
            slice((axis.start - more - first) // stride, (axis.stop + more - first) // stride)
            for axis, first in zip(place, origin, strict=True)
        )
        return rows, columns

    context_HW = np.zeros(cells_HW.shape, np.int32)
    # By their places, because the first one of equal context wins.
    for window, numbers_hw in sorted(
        zip(windows, numbers, strict=True), key=lambda one: (one[0][0].start, one[0][1].start)
    ):
        part = cells_of(window)
        own_hw = np.minimum.outer(
            *(np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)) for side in numbers_hw.shape)
        )
        most_hw = own_hw > context_HW[part]
        cells_HW[part][most_hw], context_HW[part][most_hw] = numbers_hw[most_hw], own_hw[most_hw]
    for place, window, numbers_hw in zip(places, windows, numbers, strict=True):
        rows, columns = (
            slice((one.start + margin - own.start) // stride, (one.stop - margin - own.start) // stride)
            for one, own in zip(place, window, strict=True)
        )
        cells_HW[cells_of(place, -margin)] = numbers_hw[rows, columns]
    nearest = ndimage.distance_transform_edt(cells_HW < 0, return_distances=False, return_indices=True)
    cells_HW = cells_HW[tuple(nearest)]
    cores = [_core_within(place, window, margin) for place, window in zip(places, windows, strict=True)]
    return DeepWindows(windows, cores, batches, [cells_HW[cells_of(place, RING)] for place in places])


def lone_windows(size: Sequence[int], count: int, margin: int, stride: int, batch_size: int) -> DeepWindows:
    """Return the windows for canvases of this height and width in pixels, each of which is an image of its own."""
    whole = slice(0, size[0]), slice(0, size[1])
    batches = batches_of([tuple(size)] * count, batch_size)
    numbers = _numbers([whole] * count, batches, stride)
    core = _core_within(whole, whole, margin)
    cells = [np.pad(one_hw, RING // stride, mode="reflect") for one_hw in numbers]
    return DeepWindows([whole] * count, [core] * count, batches, cells)


def rows_of(deep_NDhw: Tensor) -> Tensor:
    """Return the features of a batch of windows by cell, (T, D)."""
    return deep_NDhw.permute(0, 2, 3, 1).flatten(0, 2)


def features_at(rows_TD: Tensor, cells_Nhw: Tensor) -> Tensor:
    """Return the features (N, D, h, w) of cells, from those of all cells in the order of `DeepWindows.batches`."""
    features = rows_TD.index_select(0, cells_Nhw.flatten())
    return features.view(*cells_Nhw.shape, rows_TD.shape[1]).permute(0, 3, 1, 2)


def batches_of(sizes: Sequence[tuple[int, ...]], batch_size: int) -> list[list[int]]:
    """Return the indices of the items in batches, each with items of the same height and width only.

    Batches of large items come first, so that a stream that computes one at the end does not leave the others idle.
    """
    in_order = sorted(range(len(sizes)), key=lambda n: (-prod(sizes[n]), sizes[n]))
    groups = [list(alike) for _, alike in groupby(in_order, key=sizes.__getitem__)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def _numbers(windows: Sequence[Place], batches: Sequence[Sequence[int]], stride: int) -> list[NDArray[np.int32]]:
    """Return the numbers (h, w) of the cells of each window."""
    found: dict[int, NDArray[np.int32]] = {}
    count = 0
    for n in chain(*batches):
        height, width = (_length(side) // stride for side in windows[n])
        found[n] = np.arange(count, count + height * width, dtype=np.int32).reshape(height, width)
        count += height * width
    return [found[n] for n in range(len(windows))]


def _core_within(place: Place, window: Place, margin: int) -> Place:
    less = margin - AROUND
    rows, columns = (
        slice(side.start + less - own.start, side.stop - less - own.start)
        for side, own in zip(place, window, strict=True)
    )
    return rows, columns


def _clipped(side: slice, length: int) -> slice:
    return slice(max(0, side.start), min(length, side.stop))


def _length(side: slice) -> int:
    length: int = side.stop - side.start
    return length
