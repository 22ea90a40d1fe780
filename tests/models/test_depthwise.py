"""The faster gradients of dilated depthwise convolutions against those of torch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.depthwise import DilatedDepthwise, speed_up_depthwise
from models.padding import Mode, extend_edges


def gradients(network: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of a loss that weights every output differently."""
    x_NCHW = x_NCHW.clone().requires_grad_()
    output = network(x_NCHW)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum()
    return [output, *torch.autograd.grad(loss, [x_NCHW, *network.parameters()])]


@pytest.mark.parametrize(
    ("side", "dilation", "padding"),
    [
        ((3, 3), (2, 2), (2, 2)),
        ((5, 5), (2, 2), (4, 4)),
        ((5, 5), (4, 4), (8, 8)),
        ((3, 5), (2, 1), (2, 2)),
        ((3, 3), (2, 2), (0, 1)),
    ],
)
def test_gradients_equal_those_of_torch(
    side: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 4, side, padding=padding, dilation=dilation, groups=4, bias=False), nn.Conv2d(4, 2, 1)
    ).double()
    x_NCHW = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    expected = gradients(network, x_NCHW)
    speed_up_depthwise(network)
    assert [type(module) for module in network] == [DilatedDepthwise, nn.Conv2d]
    for ours, theirs in zip(gradients(network, x_NCHW), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_gradients_equal_those_of_torch_with_extended_edges(mode: Mode) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)).double()
    extend_edges(network, mode)
    x_NCHW = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    expected = gradients(network, x_NCHW)
    speed_up_depthwise(network)
    assert isinstance(network[0], DilatedDepthwise)
    for ours, theirs in zip(gradients(network, x_NCHW), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_faster_gradient_is_used() -> None:
    network = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    speed_up_depthwise(network)
    output = network(torch.randn(1, 4, 9, 7))
    assert type(output.grad_fn).__name__ == "_ConvolutionBackward"


def test_a_real_backbone_keeps_its_gradients_and_weights() -> None:
    torch.manual_seed(0)
    network = Backbone("tf_efficientnet_lite0").eval().double()
    x_NCHW = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def of_last(x: Tensor) -> list[Tensor]:
        output = network(x)[-1]
        return [output, *torch.autograd.grad(output.square().sum(), [*network.parameters()], allow_unused=True)]

    expected, names = of_last(x_NCHW), list(network.state_dict())
    speed_up_depthwise(network)
    assert sum(isinstance(module, DilatedDepthwise) for module in network.modules()) == 10
    assert list(network.state_dict()) == names
    for ours, theirs in zip(of_last(x_NCHW), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=5, dilation=2, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4, bias=False),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, bias=False),
    ],
    ids=["undilated", "grouped", "biased", "widely padded", "strided", "same", "doubling"],
)
def test_other_convolutions_do_not_change(conv: nn.Conv2d) -> None:
    speed_up_depthwise(conv)
    assert type(conv) is nn.Conv2d
