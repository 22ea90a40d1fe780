"""The windows in which the gate decides which classes are present, and how they share the pixels of a map.

Windows have the side of the patches that the classifier was trained on. They start at every multiple of half a side, in
the pixels of the whole slide, so they do not depend on canvases. Four windows cover each pixel. Their weights fall
toward the edges of a window and sum to one, so the gate fades in and out, and no outline of a window shows.

Shape suffixes: R rows and C columns of windows, M windows, K classes, D channels, H and W the canvas, h and w a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.gate import masked_softmax


class WindowAxis(NamedTuple):
    """The windows along one axis that overlap the core of a canvas."""

    starts_R: Tensor
    """First pixel of each window in the canvas, int32. A window that would reach beyond the canvas is moved inside."""
    side: int
    """Side of a window; less than the model's if the canvas is smaller."""
    upper_h: Tensor
    """For each map pixel of the core, the index of the later of the two windows over it, int32; the other is one
    less."""
    weight_h: Tensor
    """Weight of that later window, float32."""


def window_axis(core: int, length: int, margin: int, window: int, stride: int) -> WindowAxis:
    """Return the windows along an axis of a canvas whose core starts at model pixel `core` and has `length` pixels.

    The canvas has `margin` more pixels at both ends. `window` is the side of a window, a multiple of 16, and `stride`
    the number of model pixels per map pixel. The tensors are on the CPU; `placed` copies those of many axes to a
    device.
    """
    half, whole = window // 2, length + 2 * margin
    side = min(window, whole)
    first, last = core // half - 1, (core + length - 1) // half
    starts_R = torch.arange(first, last + 1) * half - (core - margin)
    centers_h = core + stride * torch.arange(length // stride, dtype=torch.float64) + stride / 2
    upper_h = centers_h // half
    # Raised cosine. The weight of the earlier window is the rest to one, so both sum to one in any arithmetic.
    phases_h = (centers_h - half * upper_h).float() / window
    return WindowAxis(
        starts_R.clamp(0, whole - side).int(),
        side,
        (upper_h - first).int(),
        (torch.sin(torch.pi * phases_h.double()) ** 2).float(),
    )


def placed(axes: Sequence[WindowAxis], device: torch.device) -> list[WindowAxis]:
    """Return axes with their tensors on a device, by a single copy."""
    # Numbers of four bytes each.
    parts = [part for axis in axes for part in (axis.starts_R, axis.upper_h, axis.weight_h.view(torch.int32))]
    there = iter(torch.cat(parts).to(device).split([len(part) for part in parts]))
    return [WindowAxis(next(there), axis.side, next(there), next(there).view(torch.float32)) for axis in axes]


def cut_windows(map_DHW: Tensor, rows: WindowAxis, columns: WindowAxis, stride: int = 1) -> Tensor:
    """Return all windows, row by row, as (M, D, side, side), from a map with `stride` canvas pixels per pixel.

    The map and the axes are on one device.
    """
    (index_Rh, index_Cw) = (
        axis.starts_R[:, None] // stride + torch.arange(max(1, axis.side // stride), device=map_DHW.device)
        for axis in (rows, columns)
    )
    cut_DRhCw = map_DHW[:, index_Rh[:, :, None, None], index_Cw[None, None]]
    return cut_DRhCw.permute(1, 3, 0, 2, 4).flatten(0, 1)


def gated_mean(logits_Khw: Tensor, allowed_RCK: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
    """Return the mean (K, h, w) of the core's probabilities under the gates of its windows, by the windows' weights.

    Where all windows allow one class only, its probability is 1 whatever the logits are. `logits_Khw` may have sides
    of 1. All tensors are on one device.
    """
    allowed_KRC = allowed_RCK.permute(2, 0, 1)
    upper_h, upper_w, weight_h, weight_w = rows.upper_h, columns.upper_h, rows.weight_h, columns.weight_h
    total: Tensor | float = 0.0
    for earlier_row in (0, 1):
        of_rows_h1 = (1 - weight_h if earlier_row else weight_h)[:, None]
        for earlier_column in (0, 1):
            of_columns_w = 1 - weight_w if earlier_column else weight_w
            allowed_Khw = allowed_KRC.index_select(1, upper_h - earlier_row).index_select(2, upper_w - earlier_column)
            total = total + masked_softmax(logits_Khw, allowed_Khw) * (of_rows_h1 * of_columns_w)
    assert isinstance(total, Tensor)
    return total
