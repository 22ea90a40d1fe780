"""Padding of convolutions that does not mark the edge of an image.

Zeros beyond the edge tell a network where in its input a pixel lies, and training on centered objects rewards a network
for using that (docs/decisions/0011-canvases.md). Repeated edge pixels look like the image itself.

Shape suffixes: N batch, C channels, H and W space.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.light_imports import import_light

timm_layers = import_light("timm.layers")


class ReplicatedConv2d(nn.Conv2d):
    """A convolution that repeats the outermost pixels of its input instead of adding zeros."""

    edges: tuple[int, int, int, int]
    """Pixels to add at the left, right, top and bottom of an input whose sides are multiples of the stride."""
    whole: bool
    """Whether to extend other inputs to whole strides, as "same" padding does."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        left, right, top, bottom = self.edges
        if self.whole:
            right += -int(x_NCHW.shape[3]) % self.stride[1]
            bottom += -int(x_NCHW.shape[2]) % self.stride[0]
        return super().forward(F.pad(x_NCHW, (left, right, top, bottom), mode="replicate"))


def replicate_padding(network: nn.Module) -> None:
    """Let all convolutions of a network repeat edge pixels instead of adding zeros, in place; weights stay."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            whole = isinstance(module, timm_layers.Conv2dSame)
            edges = _same_edges(module) if whole or module.padding == "same" else _edges(module)
            if any(edges):
                replicated: Any = module
                replicated.__class__ = ReplicatedConv2d
                replicated.edges, replicated.whole, replicated.padding = edges, whole, (0, 0)


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
