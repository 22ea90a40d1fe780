"""The windows in which the gate decides which classes are present, and how they share the pixels of a map.

Windows have the side of the patches that the classifier was trained on. They start at every multiple of half a side, in
the pixels of the whole slide, so they do not depend on canvases. Four windows cover each pixel. Their weights fall
toward the edges of a window and sum to one, so the gate fades in and out, and no outline of a window shows.

Shape suffixes: N canvases, R rows and C columns of windows, M windows, K classes, D channels, H and W a canvas, h and w
a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
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
    the number of model pixels per map pixel. The tensors are on the CPU.
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


class GateWindows(NamedTuple):
    """The gate windows of N canvases of one size, M in all, with every tensor on one device."""

    counts: tuple[tuple[int, int], ...]
    """Rows and columns of windows of each canvas. M counts them canvas by canvas and row by row."""
    sides: tuple[int, int]
    """Height and width of a window."""
    canvas_M: Tensor
    """Index of the canvas of each window, int32."""
    y_M: Tensor
    """First row of each window in its canvas, int32."""
    x_M: Tensor
    """First column, int32."""
    step_N1: Tensor
    """From a window to the one below it, int32."""
    below_Nh: Tensor
    """For each row of the map, the first window of the later of the two rows of windows over it, int32."""
    right_Nw: Tensor
    """For each column of the map, the later of the two columns of windows over it, int32."""
    weight_Nh: Tensor
    """Weight of that row of windows, float32. The row before has the rest to one."""
    weight_Nw: Tensor
    """Weight of that column of windows, float32."""


def gate_windows(
    corners: Sequence[tuple[int, int]], size_out: Sequence[int], margin: int, window: int, stride: int
) -> GateWindows:
    """Return the windows of canvases of one size, on the CPU; the parameters are those of `window_axis`.

    `corners` are the (x, y) of the cores in model pixels, and `size_out` is their height and width in map pixels.
    """
    height, width = (stride * length for length in size_out)
    axes = [
        (window_axis(y, height, margin, window, stride), window_axis(x, width, margin, window, stride))
        for x, y in corners
    ]
    counts = tuple((len(rows.starts_R), len(columns.starts_R)) for rows, columns in axes)
    size_N1 = torch.tensor([[count_R * count_C] for count_R, count_C in counts], dtype=torch.int32)
    step_N1 = torch.tensor([[count_C] for _, count_C in counts], dtype=torch.int32)
    first_N1 = (size_N1.cumsum(0) - size_N1).int()
    return GateWindows(
        counts=counts,
        sides=(axes[0][0].side, axes[0][1].side),
        canvas_M=torch.arange(len(counts), dtype=torch.int32).repeat_interleave(size_N1[:, 0]),
        y_M=torch.cat([rows.starts_R.repeat_interleave(len(columns.starts_R)) for rows, columns in axes]),
        x_M=torch.cat([columns.starts_R.repeat(len(rows.starts_R)) for rows, columns in axes]),
        step_N1=step_N1,
        below_Nh=first_N1 + step_N1 * torch.stack([rows.upper_h for rows, _ in axes]),
        right_Nw=torch.stack([columns.upper_h for _, columns in axes]),
        weight_Nh=torch.stack([rows.weight_h for rows, _ in axes]),
        weight_Nw=torch.stack([columns.weight_h for _, columns in axes]),
    )


def placed(windows: Sequence[GateWindows], device: torch.device) -> list[GateWindows]:
    """Return windows with their tensors on a device, by a single copy."""
    # Numbers of four bytes each.
    tensors = [part for one in windows for part in one[2:]]
    flat = torch.cat([part.flatten().view(torch.int32) for part in tensors]).to(device)
    parts = flat.split([part.numel() for part in tensors])
    there = iter(part.view(of.dtype).view(of.shape) for part, of in zip(parts, tensors, strict=True))
    return [GateWindows(one.counts, one.sides, *islice(there, len(one) - 2)) for one in windows]


def cut_windows(map_NDHW: Tensor, windows: GateWindows, chosen: slice, stride: int = 1) -> Tensor:
    """Return the chosen windows as (M, D, side, side), from maps of the canvases with `stride` pixels per cell."""
    rows_Mh, columns_Mw = (
        start_M[chosen, None] // stride + torch.arange(max(1, side // stride), device=map_NDHW.device)
        for start_M, side in ((windows.y_M, windows.sides[0]), (windows.x_M, windows.sides[1]))
    )
    canvas_M11 = windows.canvas_M[chosen, None, None]
    cut_MhwD = map_NDHW.permute(0, 2, 3, 1)[canvas_M11, rows_Mh[:, :, None], columns_Mw[:, None, :]]
    return cut_MhwD.permute(0, 3, 1, 2).contiguous()


def gated_mean(logits_NKhw: Tensor, allowed_MK: Tensor, windows: GateWindows) -> Tensor:
    """Return the mean (N, K, h, w) of the cores' probabilities under the gates of their windows, by their weights.

    Where all windows allow one class only, its probability is 1 whatever the logits are. `logits_NKhw` may have sides
    of 1.
    """
    allowed_KM = allowed_MK.T.contiguous()
    total: Tensor | float = 0.0
    for above in (0, 1):
        window_Nh = windows.below_Nh - above * windows.step_N1
        of_rows_Nh = 1 - windows.weight_Nh if above else windows.weight_Nh
        for left in (0, 1):
            of_columns_Nw = 1 - windows.weight_Nw if left else windows.weight_Nw
            window_Nhw = window_Nh[:, :, None] + (windows.right_Nw - left)[:, None, :]
            allowed_KNhw = allowed_KM.index_select(1, window_Nhw.flatten()).view(-1, *window_Nhw.shape)
            weight_Nhw = of_rows_Nh[:, :, None] * of_columns_Nw[:, None, :]
            total = total + masked_softmax(logits_NKhw, allowed_KNhw.transpose(0, 1)) * weight_Nhw[:, None]
    assert isinstance(total, Tensor)
    return total
