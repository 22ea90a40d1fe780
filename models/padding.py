"""Padding of convolutions that does not mark the edge of an image.

Zeros beyond the edge tell a network where in its input a pixel lies, and training on centered objects rewards a network
for using that (docs/decisions/0011-canvases.md). Repeated or mirrored pixels look like the image itself.

Shape suffixes: N batch, C channels, H and W space.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.light_imports import import_light

timm_layers = import_light("timm.layers")

Mode = Literal["replicate", "reflect"]
"""`replicate` repeats the pixel at the edge, `reflect` mirrors the pixels beside it."""


class ExtendedConv2d(nn.Conv2d):
    """A convolution that continues its input beyond the edges instead of adding zeros."""

    edges: tuple[int, int, int, int]
    """Pixels to add at the left, right, top and bottom of an input whose sides are multiples of the stride."""
    whole: bool
    """Whether to extend other inputs to whole strides, as "same" padding does."""
    mode: Mode

    def forward(self, x_NCHW: Tensor) -> Tensor:
        left, right, top, bottom = self.edges
        if self.whole:
            right += -int(x_NCHW.shape[3]) % self.stride[1]
            bottom += -int(x_NCHW.shape[2]) % self.stride[0]
        fits = max(left, right) < int(x_NCHW.shape[3]) and max(top, bottom) < int(x_NCHW.shape[2])
        # An image smaller than the padding has too few pixels to mirror.
        mode = self.mode if fits else "replicate"
        return super().forward(F.pad(x_NCHW, (left, right, top, bottom), mode=mode))


def extend_edges(network: nn.Module, mode: Mode) -> None:
    """Let all convolutions of a network continue their input instead of adding zeros, in place; weights stay."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            whole = isinstance(module, timm_layers.Conv2dSame)
            edges = _same_edges(module) if whole or module.padding == "same" else _edges(module)
            if any(edges):
                extended: Any = module
                extended.__class__ = ExtendedConv2d
                extended.edges, extended.whole, extended.mode, extended.padding = edges, whole, mode, (0, 0)


def _edges(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    if isinstance(conv.padding, str):  # "valid"
        return 0, 0, 0, 0
    vertical, horizontal = conv.padding
    return horizontal, horizontal, vertical, vertical


def _same_edges(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the padding that divides the size by the stride; an odd pixel goes to the right and to the bottom."""
    vertical, horizontal = (
        max(0, dilation * (side - 1) + 1 - stride)
        for side, dilation, stride in zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    )
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2
