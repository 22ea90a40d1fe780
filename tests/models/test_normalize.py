"""Shape suffixes: N images, C channels, H and W space."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from models.normalize import OfBytes, normalized
from models.openvino_network import IMAGE, OpenVinoNetwork
from tests.cases import needs_openvino

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def every_byte() -> Tensor:
    """Return each value of a byte in each channel, as one image of 16 × 16 pixels, (1, 16, 16, 3)."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    return torch.cat([values, values.flip(1), values.flip(2)], dim=3)


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_bytes_are_scaled_to_one_centered_and_divided(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    x_NCHW = normalized(every_byte(), torch.tensor(mean), torch.tensor(std))
    for c in range(3):
        expected_NHW = (every_byte()[..., c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(x_NCHW[:, c], expected_NHW.float(), rtol=1e-6, atol=1e-6)
    assert x_NCHW.is_contiguous(memory_format=torch.channels_last)


def test_mean_and_std_of_a_half_give_the_same_bits_as_scaling_to_plus_minus_one() -> None:
    half_C = torch.full((3,), 0.5)
    scaled_NCHW = every_byte().permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    assert torch.equal(normalized(every_byte(), half_C, half_C), scaled_NCHW)


def test_values_have_the_bits_of_the_formula_and_the_memory_layout_of_the_image_does_not_matter() -> None:
    mean_C, std_C, image_NHWC = torch.tensor(MEAN), torch.tensor(STD), every_byte()[:, :, :10]
    expected_NCHW = ((image_NHWC.float() / 255 - mean_C) / std_C).permute(0, 3, 1, 2)
    column_major_NHWC = image_NHWC.transpose(1, 2).contiguous().transpose(1, 2)
    for rgb_NHWC in (image_NHWC, image_NHWC.contiguous(), column_major_NHWC, image_NHWC[:0]):
        assert torch.equal(normalized(rgb_NHWC, mean_C, std_C), expected_NCHW[: len(rgb_NHWC)])


def test_the_bytes_stay_as_they_are() -> None:
    rgb_NHWC = every_byte()
    normalized(rgb_NHWC, torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(rgb_NHWC, every_byte())


def test_a_network_for_bytes_gets_the_bits_of_the_formula_in_torch_and_in_a_trace() -> None:
    mean_C, std_C = torch.tensor(MEAN), torch.tensor(STD)
    network = OfBytes(nn.Identity(), mean_C, std_C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenVINO still needs it
        traced = torch.jit.trace(network, (torch.zeros((1, 8, 12, 3), dtype=torch.uint8),))
    images_NHWC = torch.cat([every_byte(), every_byte().flip(1)])
    for rgb_NHWC in (images_NHWC, images_NHWC[:, 3:, :10], images_NHWC.transpose(1, 2), images_NHWC[:0]):
        expected_NCHW = normalized(rgb_NHWC, mean_C, std_C)
        assert torch.equal(network(rgb_NHWC), expected_NCHW)
        assert torch.equal(traced(rgb_NHWC), expected_NCHW)


@needs_openvino
def test_openvino_normalizes_bytes_to_the_same_bits() -> None:
    mean_C, std_C, conv = torch.tensor(MEAN), torch.tensor(STD), nn.Conv2d(3, 3, 1, bias=False).eval()
    conv.weight.data = torch.eye(3)[:, :, None, None]
    network = OpenVinoNetwork(OfBytes(conv, mean_C, std_C), 32, maps=[IMAGE])
    images_NHWC = every_byte().repeat(2, 3, 4, 1)
    # The second image is not contiguous, and the third one is smaller.
    for rgb_NHWC in (images_NHWC, images_NHWC[:1, 5:43, 7:], images_NHWC[:, :32, :32]):
        assert torch.equal(network(rgb_NHWC), normalized(rgb_NHWC, mean_C, std_C))


@needs_openvino
def test_an_argument_that_is_not_contiguous_is_copied_to_memory_that_the_next_one_can_use() -> None:
    network = OpenVinoNetwork(nn.Conv2d(3, 1, 1).eval(), 32)
    generator = torch.Generator().manual_seed(0)
    for number, sides in enumerate(((32, 32), (96, 64), (32, 64))):
        x_NCHW = torch.randn((1, 3, *sides), generator=generator)
        wider_NCHW = torch.randn((1, 3, 128, 128), generator=generator)
        wider_NCHW[:, :, 3 : 3 + sides[0], 5 : 5 + sides[1]] = x_NCHW
        before_NCHW = wider_NCHW.clone()
        with torch.inference_mode(mode=number == 1):
            found_NCHW = network(wider_NCHW[:, :, 3 : 3 + sides[0], 5 : 5 + sides[1]])
        assert torch.equal(found_NCHW, network(x_NCHW))
        assert torch.equal(wider_NCHW, before_NCHW)
