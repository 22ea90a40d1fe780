from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.padding import ExtendedConv2d, Mode, extend_edges, pad_before_expansion, timm_layers
from models.segmenter import build_segmenter


@pytest.mark.parametrize(
    ("conv", "edges"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (1, 1, 1, 1)),
        (nn.Conv2d(2, 3, (3, 5), padding=(1, 2), stride=2), (2, 2, 1, 1)),
        (nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 2, 2, 2)),
        (timm_layers.Conv2dSame(2, 3, 3, stride=2), (0, 1, 0, 1)),
        (timm_layers.Conv2dSame(2, 3, 5, stride=2), (1, 2, 1, 2)),
    ],
)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_an_image_continues_as_far_as_zeros_were_added(conv: nn.Conv2d, edges: tuple[int, ...], mode: Mode) -> None:
    conv = copy.deepcopy(conv)
    x_NCHW = torch.randn(2, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    shape = conv(x_NCHW).shape
    around_NCHW = F.pad(x_NCHW, edges, mode=mode)
    expected = F.conv2d(around_NCHW, conv.weight, conv.bias, conv.stride, 0, conv.dilation)
    names = list(conv.state_dict())
    extend_edges(nn.Sequential(conv), mode)
    assert torch.equal(conv(x_NCHW), expected)
    assert expected.shape == shape
    assert list(conv.state_dict()) == names


def test_same_padding_keeps_the_output_size_of_odd_images() -> None:
    conv = timm_layers.Conv2dSame(1, 1, 3, stride=2)
    extend_edges(nn.Sequential(conv), "reflect")
    assert conv(torch.zeros(1, 1, 75, 9)).shape == (1, 1, 38, 5)


def test_an_image_smaller_than_the_padding_repeats_its_edge() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=4, dilation=4, bias=False)
    extend_edges(nn.Sequential(conv), "reflect")
    x_NCHW = torch.rand(1, 1, 4, 9)
    around_NCHW = F.pad(x_NCHW, (4, 4, 4, 4), mode="replicate")
    assert torch.equal(conv(x_NCHW), F.conv2d(around_NCHW, conv.weight, dilation=4))


def test_convolutions_without_padding_do_not_change() -> None:
    convs = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, padding="valid"))
    extend_edges(convs, "reflect")
    assert all(type(conv) is nn.Conv2d for conv in convs)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Backbone("tf_efficientnet_lite0", 4),
        lambda: Backbone("resnet18"),
        lambda: build_segmenter("tu-tf_efficientnet_lite0", 3),
        lambda: build_segmenter("resnet18", 3, 5, (2, 4, 6)),
    ],
    ids=["cut lite0", "resnet18", "segmenter on lite0", "segmenter on resnet18"],
)
def test_an_even_image_gives_an_even_map_up_to_its_edges(build: Any) -> None:
    torch.manual_seed(1)
    network = build().eval()
    for module in network.modules():
        # Arbitrary statistics, so that the features do not vanish.
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.inference_mode():
        output = network(torch.full((1, 3, 96, 64), 0.7))
    map_NChw: Tensor = output if isinstance(output, Tensor) else output.deep
    assert map_NChw.abs().max() > 1e-3
    torch.testing.assert_close(map_NChw, map_NChw[:, :, :1, :1].expand_as(map_NChw), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: Backbone("tf_efficientnet_lite0", 4), (96, 64)),
        (lambda: Backbone("tf_efficientnet_lite0", 4), (75, 64)),
        (lambda: Backbone("efficientnet_b0", 4), (96, 64)),  # with squeeze-and-excitation
        (lambda: Backbone("test_efficientnet_gn"), (96, 64)),  # its norms average the whole map
        (lambda: build_segmenter("tu-tf_efficientnet_lite0", 3), (96, 64)),
    ],
    ids=["same padding", "odd image", "squeeze and excitation", "group norm", "segmenter"],
)
def test_edges_before_the_expansion_give_the_same_map(build: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    network = build()
    moved = pad_before_expansion(network)
    assert network.training
    x_NCHW = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, output = network.eval()(x_NCHW), moved.eval()(x_NCHW)
    for expected_NChw, map_NChw in zip(_maps(expected), _maps(output), strict=True):
        torch.testing.assert_close(map_NChw, expected_NChw, rtol=1e-6, atol=1e-7)
        assert expected_NChw.std() > 1e-4
    assert list(moved.state_dict()) == list(network.state_dict())


def test_the_wide_maps_are_not_extended() -> None:
    """Every depthwise convolution after an expansion is a plain one, and its expansion extends the narrow map."""
    moved = pad_before_expansion(Backbone("tf_efficientnet_lite0", 4))
    assert not any(module.training for module in moved.modules())
    blocks = [block for block in moved.modules() if hasattr(block, "conv_pwl")]
    assert len(blocks) == 10
    for block in blocks:
        assert type(block.conv_dw) is nn.Conv2d
        assert isinstance(block.conv_pw, ExtendedConv2d)
        (side, _), (dilation, _), (stride, _) = (
            block.conv_dw.kernel_size,
            block.conv_dw.dilation,
            block.conv_dw.stride,
        )
        left, right, _, _ = block.conv_pw.edges
        assert left + right == dilation * (side - 1) + 1 - stride
    plain = Backbone("resnet18")
    assert pad_before_expansion(plain) is plain


def _maps(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
