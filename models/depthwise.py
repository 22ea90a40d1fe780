"""Faster training of dilated depthwise convolutions on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.padding import ExtendedConv2d


def speed_up_depthwise(network: nn.Module) -> None:
    """Give the dilated depthwise convolutions of a network a faster gradient, in place; outputs and weights stay.

    oneDNN takes ten times as long for the input gradient of these convolutions as for their output. The input gradient
    is the depthwise convolution of the output gradient with the kernel rotated by 180°, and is computed this way here.
    docs/decisions/0010-workarounds.md has the measurement.
    """
    for module in network.modules():
        if type(module) in _FASTER and isinstance(module, nn.Conv2d) and _applies(module):
            module.__class__ = _FASTER[type(module)]


def _applies(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is dilated and depthwise, and has no bias and no more padding than its reach."""
    if isinstance(conv.padding, str):
        return False
    bounded = all(p <= r for p, r in zip(conv.padding, _reach(conv.kernel_size, conv.dilation), strict=True))
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return depthwise and bounded and conv.stride == (1, 1) and max(conv.dilation) > 1 and conv.bias is None


def _reach(side: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return how many pixels a convolution without padding takes from the height and the width."""
    return [d * (k - 1) for d, k in zip(dilation, side, strict=True)]


class DilatedDepthwise(nn.Conv2d):
    """A dilated depthwise convolution whose input gradient is a convolution too."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002, ARG002 - the signature of torch
        result: Tensor = _Convolution.apply(input, weight, self.padding, self.dilation)  # type: ignore[no-untyped-call]
        return result


class ExtendedDepthwise(ExtendedConv2d, DilatedDepthwise):
    """The same convolution of an input that continues beyond its edges."""


_FASTER: dict[type[nn.Module], type[nn.Conv2d]] = {nn.Conv2d: DilatedDepthwise, ExtendedConv2d: ExtendedDepthwise}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_C1kk: Tensor, padding: Any, dilation: Any) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_C1kk)
        ctx.geometry = padding, dilation
        return F.conv2d(x_NCHW, weight_C1kk, None, 1, padding, dilation, len(weight_C1kk))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C1kk = ctx.saved_tensors
        padding, dilation = ctx.geometry
        by_x, by_weight = None, None
        if ctx.needs_input_grad[0]:
            turned = weight_C1kk.flip(2, 3)
            beyond = [r - p for r, p in zip(_reach(turned.shape[2:], dilation), padding, strict=True)]
            by_x = F.conv2d(gradient_NCHW, turned, None, 1, beyond, dilation, len(weight_C1kk))
        if ctx.needs_input_grad[1]:
            by_weight = torch.ops.aten.convolution_backward(
                gradient_NCHW, x_NCHW, weight_C1kk, None, [1, 1], padding, dilation, False, [0, 0], len(weight_C1kk),
                [False, True, False],
            )[1]  # fmt: skip
        return by_x, by_weight, None, None
