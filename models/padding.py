"""Padding of convolutions that does not mark the edge of an image.

Zeros beyond the edge tell a network where in its input a pixel lies, and training on centered objects rewards a network
for using that (docs/decisions/0011-canvases.md). Repeated or mirrored pixels look like the image itself.

Shape suffixes: N batch, C channels, H and W space.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.light_imports import import_light

timm_layers = import_light("timm.layers")
timm_blocks = import_light("timm.models._efficientnet_blocks")

Mode = Literal["replicate", "reflect"]
"""`replicate` repeats the pixel at the edge, `reflect` mirrors the pixels beside it."""


class ExtendedConv2d(nn.Conv2d):
    """A convolution that continues its input beyond the edges instead of adding zeros."""

    edges: tuple[int, int, int, int]
    """Pixels to add at the left, right, top and bottom of an input whose sides are multiples of `multiple`."""
    multiple: tuple[int, int]
    """Other inputs are also extended to multiples of this height and width, as "same" padding does for strides."""
    mode: Mode

    def forward(self, x_NCHW: Tensor) -> Tensor:
        left, right, top, bottom = self.edges
        right += -int(x_NCHW.shape[3]) % self.multiple[1]
        bottom += -int(x_NCHW.shape[2]) % self.multiple[0]
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
                vertical, horizontal = module.stride
                _extend(module, edges, (vertical, horizontal) if whole else (1, 1), mode)


def mirror_edges(network: nn.Module) -> None:
    """Let every `ExtendedConv2d` of a network mirror the edges, in place."""
    for module in network.modules():
        if isinstance(module, ExtendedConv2d):
            module.mode = "reflect"


def pad_before_expansion(network: nn.Module) -> nn.Module:
    """Return a network that gives the same output in eval mode, and whose inverted residuals extend smaller maps.

    An inverted residual first expands its input to six times the channels by a 1×1 convolution. The depthwise
    convolution after it extends the edges of all of them, which copies the largest map of the block. A 1×1 convolution,
    a batch norm in eval mode and an activation treat each pixel alone, so the edges of the input can be extended
    instead. The network returned is a copy in eval mode, or the argument itself if it has no such blocks.
    """
    if not any(_expands(block) for block in network.modules()):
        return network
    moved = copy.deepcopy(network).eval()
    for block in filter(_expands, moved.modules()):
        parts: Any = block
        depthwise = parts.conv_dw
        _extend(parts.conv_pw, depthwise.edges, depthwise.multiple, depthwise.mode)
        depthwise.__class__ = nn.Conv2d
    return moved


def _expands(block: nn.Module) -> bool:
    expansion, depthwise = getattr(block, "conv_pw", None), getattr(block, "conv_dw", None)
    return (
        isinstance(block, timm_blocks.InvertedResidual)
        and type(expansion) is nn.Conv2d
        and expansion.kernel_size == expansion.stride == (1, 1)
        and expansion.padding == (0, 0)
        and not averages_map(block.bn1)  # the added pixels would count
        and isinstance(depthwise, ExtendedConv2d)
    )


def averages_map(norm: nn.Module) -> bool:
    """Return whether a normalization in eval mode averages its input, as a group norm does, so that pixels mix."""
    return not isinstance(norm, (nn.BatchNorm2d, nn.Identity))


def _extend(conv: nn.Module, edges: tuple[int, int, int, int], multiple: tuple[int, int], mode: Mode) -> None:
    extended: Any = conv
    extended.__class__ = ExtendedConv2d
    extended.edges, extended.multiple, extended.mode, extended.padding = edges, multiple, mode, (0, 0)


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
