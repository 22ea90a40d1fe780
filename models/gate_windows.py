"""The windows in which the gate decides which classes are present, and the gate that follows for each pixel of a map.

Windows have the side of the patches that the classifier was trained on. They start at every multiple of a quarter of a
side, rounded down to a multiple of 16 px, in the pixels of the whole slide. So they do not depend on canvases. With a
side of 64 px, 16 windows cover each pixel. The gate of a class is the share of these windows in which the class passes.
Windows weigh less toward their edges, so the gate fades in and out, and no outline of a window shows.

Shape suffixes: N canvases, R rows and C columns of windows, M windows of all canvases, K classes, D channels, H and W a
canvas, h and w a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from models.backbone_windows import Place
from models.gate import gated_softmax

CELL = 16
"""Windows start at multiples of this many model pixels. The strides of both networks, 8 and 16, divide it."""

WHOLE = 1024
"""What the weights of the windows over a pixel sum to, along one axis. Weights are integers, so sums of products of
them are exact in float32, in any order and on any device. TF32 also has integers up to 2,048."""


class WindowAxis(NamedTuple):
    """The windows along one axis that overlap the core of a canvas."""

    starts_R: Tensor
    """First pixel of each window in the canvas, int32. A window that would reach beyond the canvas is moved inside."""
    side: int
    """Side of a window; less than the model's if the canvas is smaller."""
    weight_hR: Tensor
    """Weight of each window for each map pixel of the core: integers from 0 to `WHOLE`, as float32."""


def window_axis(core: int, length: int, margin: int, window: int, stride: int) -> WindowAxis:
    """Return the windows along an axis of a canvas whose core starts at model pixel `core` and has `length` pixels.

    The canvas has `margin` more pixels at both ends. `window` is the side of a window, a multiple of 16, and `stride`
    the number of model pixels per map pixel. The number of windows depends on `length` and `window` alone: the last
    one can be there twice, then once without weight. The tensors are on the CPU.
    """
    step, whole = window_step(window), length + 2 * margin
    side = min(window, whole)
    first, last = (core - window) // step + 1, (core + length - 1) // step
    places_R = (first + torch.arange(-(-(length + window - CELL) // step))).clamp(max=last)
    starts_R = places_R * step - (core - margin)
    centers_h = core + stride * torch.arange(length // stride, dtype=torch.float64) + stride / 2
    phases_hR = (centers_h[:, None] - step * places_R) / window
    # Raised cosine.
    weight_hR = torch.where((phases_hR > 0) & (phases_hR < 1), torch.sin(torch.pi * phases_hR) ** 2, 0.0)
    weight_hR[:, places_R.diff(prepend=places_R[:1] - 1) == 0] = 0.0
    return WindowAxis(starts_R.clamp(0, whole - side).int(), side, _in_whole_parts(weight_hR))


def window_step(window: int) -> int:
    """Return the distance between windows of this side: a quarter of it, in whole cells."""
    return max(CELL, window // 4 // CELL * CELL)


def _in_whole_parts(weight_hR: Tensor) -> Tensor:
    """Return weights as integers that sum to `WHOLE` in each row; the largest one takes what rounding leaves."""
    parts_hR = (weight_hR / weight_hR.sum(dim=1, keepdim=True) * WHOLE).round()
    left_h1 = WHOLE - parts_hR.sum(dim=1, keepdim=True)
    return parts_hR.scatter_add(1, weight_hR.argmax(dim=1, keepdim=True), left_h1).float()


class GateWindows(NamedTuple):
    """The gate windows of N canvases of one size, with every tensor on one device. M counts them canvas by canvas."""

    sides: tuple[int, int]
    """Height and width of a window."""
    y_NR: Tensor
    """First row of each row of windows in its canvas, int32."""
    x_NC: Tensor
    """First column, int32."""
    weight_NhR: Tensor
    """See `WindowAxis.weight_hR`."""
    weight_NwC: Tensor
    """The same along the width."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return N, R and C."""
        return (*self.y_NR.shape, self.x_NC.shape[1])


def gate_windows(
    corners: Sequence[tuple[int, int]], size_out: Sequence[int], margin: int, window: int, stride: int
) -> GateWindows:
    """Return the windows of canvases of one size, on the CPU; the parameters are those of `window_axis`.

    `corners` are the (x, y) of the cores in model pixels, and `size_out` is their height and width in map pixels.
    """
    height, width = (stride * length for length in size_out)
    rows = [window_axis(y, height, margin, window, stride) for _, y in corners]
    columns = [window_axis(x, width, margin, window, stride) for x, _ in corners]
    return GateWindows(
        sides=(rows[0].side, columns[0].side),
        y_NR=torch.stack([axis.starts_R for axis in rows]),
        x_NC=torch.stack([axis.starts_R for axis in columns]),
        weight_NhR=torch.stack([axis.weight_hR for axis in rows]),
        weight_NwC=torch.stack([axis.weight_hR for axis in columns]),
    )


def placed(
    windows: Sequence[GateWindows], cells: Sequence[Tensor], device: torch.device
) -> tuple[list[GateWindows], list[Tensor]]:
    """Return windows with their tensors on a device, and those of `DeepWindows.cells`, by a single copy."""
    # Numbers of four bytes each.
    tensors = [part for one in windows for part in one[1:]] + list(cells)
    flat = torch.cat([part.flatten().view(torch.int32) for part in tensors]).to(device)
    parts = flat.split([part.numel() for part in tensors])
    there = iter(part.view(of.dtype).view(of.shape) for part, of in zip(parts, tensors, strict=True))
    return [GateWindows(one.sides, *islice(there, len(one) - 1)) for one in windows], list(there)


def cut_windows(map_NDHW: Tensor, windows: GateWindows, chosen: range, stride: int = 1) -> Tensor:
    """Return the chosen windows as (M, D, side, side), from maps of the canvases with `stride` pixels per cell."""
    _, count_R, count_C = windows.shape
    number_M = torch.arange(chosen.start, chosen.stop, device=map_NDHW.device)
    canvas_M = number_M // (count_R * count_C)
    start_M = windows.y_NR[canvas_M, number_M // count_C % count_R], windows.x_NC[canvas_M, number_M % count_C]
    rows_Mh, columns_Mw = (
        of_axis_M[:, None] // stride + torch.arange(max(1, side // stride), device=map_NDHW.device)
        for of_axis_M, side in zip(start_M, windows.sides, strict=True)
    )
    cut_MhwD = map_NDHW.permute(0, 2, 3, 1)[canvas_M[:, None, None], rows_Mh[:, :, None], columns_Mw[:, None, :]]
    return cut_MhwD.permute(0, 3, 1, 2).contiguous()


class PixelGates(NamedTuple):
    """The gate of each class in each pixel of the cores of N canvases."""

    gate_NKhw: Tensor
    """Share of the windows over a pixel that allow the class, by their weights, float32."""
    covered_N1hw: Tensor
    """Share of the windows that allow any class."""

    def contested(self, parts: Sequence[Place]) -> list[Tensor]:
        """Return, for each part of the cores, the canvases (N,) bool whose probabilities in this part depend on logits.

        They do if the gate allows several classes for a pixel. Parts are rows and columns of the map.
        """
        several_Nhw = self.gate_NKhw.sign().sum(dim=1) > 1  # gates are not negative; `sum` is faster with floats
        return [several_Nhw[:, *part].flatten(1).any(dim=1) for part in parts]

    def inside(self, part: Place) -> PixelGates:
        """Return the gates in a part of the cores: rows and columns of the map."""
        return PixelGates(*(one[..., *part] for one in self))

    def probabilities(self, logits_NKhw: Tensor) -> Tensor:
        """Return the probabilities (N, K, h, w) under these gates; logits may have sides of 1 instead of N, h and w.

        They sum to the share of the windows that allow any class.
        """
        return gated_softmax(logits_NKhw, self.gate_NKhw) * self.covered_N1hw


def pixel_gates(allowed_MK: Tensor, windows: GateWindows) -> PixelGates:
    """Return the gates that follow from the classes that are allowed in each window, (M, K) bool."""
    allowed_NKRC = allowed_MK.unflatten(0, windows.shape).permute(0, 3, 1, 2)
    # "No class" is the last one.
    shares_NKRC = torch.cat([allowed_NKRC, ~allowed_NKRC.any(dim=1, keepdim=True)], dim=1).float()
    parts_NKhw = torch.einsum("nhr,nkrc,nwc->nkhw", windows.weight_NhR, shares_NKRC, windows.weight_NwC)
    gate_NKhw, without_N1hw = (parts_NKhw / WHOLE**2).tensor_split([-1], dim=1)
    return PixelGates(gate_NKhw, 1 - without_N1hw)
