"""The windows in which the gate decides which classes are present, and how they share the pixels of a map.

Windows have the side of the patches that the classifier was trained on. They start at every multiple of half a side, in
the pixels of the whole slide, so they do not depend on canvases. Four windows cover each pixel. Their weights fall
toward the edges of a window and sum to one, so the gate fades in and out, and no outline of a window shows.

Shape suffixes: R rows and C columns of windows, M windows, K classes, D channels, H and W the canvas, h and w a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.gate import masked_softmax


@dataclass(frozen=True)
class WindowAxis:
    """The windows along one axis that overlap the core of a canvas."""

    starts: tuple[int, ...]
    """First pixel of each window in the canvas. A window that would reach beyond the canvas is moved inside."""
    side: int
    """Side of a window; less than the model's if the canvas is smaller."""
    upper: tuple[int, ...]
    """For each map pixel of the core, the index of the later of the two windows over it; the other is one less."""
    weight: tuple[float, ...]
    """Weight of that later window."""


def window_axis(core: int, length: int, margin: int, window: int, stride: int) -> WindowAxis:
    """Return the windows along an axis of a canvas whose core starts at model pixel `core` and has `length` pixels.

    The canvas has `margin` more pixels at both ends. `window` is the side of a window, a multiple of 16, and `stride`
    the number of model pixels per map pixel.
    """
    half, whole = window // 2, length + 2 * margin
    side = min(window, whole)
    first, last = core // half - 1, (core + length - 1) // half
    starts = (index * half - (core - margin) for index in range(first, last + 1))
    centers = [core + stride * pixel + stride / 2 for pixel in range(length // stride)]
    upper = [int(center // half) for center in centers]
    # Raised cosine. The weight of the earlier window is the rest to one, so both sum to one in any arithmetic.
    phases = torch.tensor([center - half * index for center, index in zip(centers, upper, strict=True)]) / window
    return WindowAxis(
        tuple(min(max(start, 0), whole - side) for start in starts),
        side,
        tuple(index - first for index in upper),
        tuple((torch.sin(torch.pi * phases.double()) ** 2).tolist()),
    )


def cut_windows(map_DHW: Tensor, rows: WindowAxis, columns: WindowAxis, stride: int = 1) -> Tensor:
    """Return all windows, row by row, as (M, D, side, side), from a map with `stride` canvas pixels per pixel."""
    (index_Rh, index_Cw) = (
        torch.tensor(axis.starts, device=map_DHW.device)[:, None] // stride
        + torch.arange(max(1, axis.side // stride), device=map_DHW.device)
        for axis in (rows, columns)
    )
    cut_DRhCw = map_DHW[:, index_Rh[:, :, None, None], index_Cw[None, None]]
    return cut_DRhCw.permute(1, 3, 0, 2, 4).flatten(0, 1)


def gated_mean(logits_Khw: Tensor, allowed_RCK: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
    """Return the mean (K, h, w) of the core's probabilities under the gates of its windows, by the windows' weights.

    Where all windows allow one class only, its probability is 1 whatever the logits are. `logits_Khw` may have sides
    of 1.
    """
    allowed_KRC = allowed_RCK.permute(2, 0, 1)
    upper_h, upper_w = (torch.tensor(axis.upper, device=logits_Khw.device) for axis in (rows, columns))
    weight_h, weight_w = (torch.tensor(axis.weight, device=logits_Khw.device) for axis in (rows, columns))
    total: Tensor | float = 0.0
    for earlier_row in (0, 1):
        of_rows_h1 = (1 - weight_h if earlier_row else weight_h)[:, None]
        for earlier_column in (0, 1):
            of_columns_w = 1 - weight_w if earlier_column else weight_w
            allowed_Khw = allowed_KRC.index_select(1, upper_h - earlier_row).index_select(2, upper_w - earlier_column)
            total = total + masked_softmax(logits_Khw, allowed_Khw) * (of_rows_h1 * of_columns_w)
    assert isinstance(total, Tensor)
    return total
