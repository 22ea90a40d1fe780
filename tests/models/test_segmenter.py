from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import ArchitectureError
from models.padding import pad_before_expansion
from models.segmenter import NATIVE_STRIDE, RIM, CoreSegmenter, build_segmenter, logits_at_stride
from tests.models.networks import ColorSegmenter, vary_decoder


def test_logits_have_stride_4() -> None:
    network = build_segmenter("tu-tf_efficientnet_lite0", 3).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 64, 96)).shape == (1, 3, 16, 24)


@pytest.mark.full
def test_a_logit_depends_on_the_pixels_within_288_px_only() -> None:
    torch.manual_seed(0)
    network = build_segmenter("tu-tf_efficientnet_lite0", 2).eval().requires_grad_(False)
    x_NCHW = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient_NCHW,) = torch.autograd.grad(network(x_NCHW)[0, 0, 80, 80], x_NCHW)
    touched = gradient_NCHW[0].abs().sum(dim=0).nonzero()
    assert touched.min() >= 320 - 288
    assert touched.max() <= 324 + 288
    assert touched.max() - touched.min() > 320


@pytest.mark.parametrize("margin", [16, 48, 64, 96])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_the_core_has_the_logits_of_the_whole_canvas(depth: int, margin: int) -> None:
    """Encoders of three stages have stride 8 before the decoder, all others 16."""
    torch.manual_seed(0)
    network: Any = build_segmenter("resnet18", 3, depth, (2, 4, 6)).eval()
    vary_decoder(network)
    x_NCHW = torch.rand(2, 3, 224, 256, generator=torch.Generator().manual_seed(1))
    cells = margin // NATIVE_STRIDE - RIM
    with torch.inference_mode():
        whole_NKhw = network(x_NCHW)
        core_NKhw = CoreSegmenter(network, margin)(x_NCHW)
    torch.testing.assert_close(core_NKhw, whole_NKhw[:, :, cells:-cells, cells:-cells], atol=1e-6, rtol=1e-5)
    assert whole_NKhw.std() > 0.005


def test_the_core_of_a_network_as_a_run_computes_it_has_the_logits_of_the_whole_canvas() -> None:
    torch.manual_seed(0)
    network = build_segmenter("tu-tf_efficientnet_lite0", 3).eval()
    x_NCHW = torch.rand(1, 3, 192, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole_NKhw = network(x_NCHW)
        core_NKhw = CoreSegmenter(pad_before_expansion(network), 32)(x_NCHW)
    torch.testing.assert_close(core_NKhw, whole_NKhw[:, :, 7:-7, 7:-7], atol=1e-6, rtol=1e-5)
    assert whole_NKhw.std() > 0.005


def test_a_decoder_with_a_bias_computes_the_whole_canvas() -> None:
    torch.manual_seed(0)
    network: Any = build_segmenter("resnet18", 3, 4, (2, 4, 6)).eval()
    pointwise = network.decoder.block2[0][1]
    pointwise.bias = torch.nn.Parameter(torch.ones(pointwise.out_channels))
    x_NCHW = torch.rand(1, 3, 160, 192, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(CoreSegmenter(network, 32)(x_NCHW), network(x_NCHW)[:, :, 7:-7, 7:-7])


def test_a_network_of_another_kind_computes_the_whole_canvas() -> None:
    network = ColorSegmenter(((255, 0, 0), (0, 255, 0)), 40.0).eval()
    x_NCHW = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(CoreSegmenter(network, 32)(x_NCHW), network(x_NCHW)[:, :, 7:-7, 7:-7])


def test_stages_that_the_decoder_does_not_read_are_not_built() -> None:
    network = build_segmenter("tu-tf_efficientnet_lite0", 2)
    assert sum(parameter.numel() for parameter in network.parameters()) < 1_300_000
    deeper = build_segmenter("tu-tf_efficientnet_lite0", 2, 5, (2, 4, 6))
    assert not {name for name, _ in network.named_parameters()} - {name for name, _ in deeper.named_parameters()}


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(ArchitectureError, match="no-such-net"):
        build_segmenter("no-such-net", 2)


@pytest.mark.parametrize("encoder", ["tu-hrnet_w18", "tu-swinv2_cr_base_224"])
def test_an_encoder_that_cannot_be_dilated_is_refused(encoder: str) -> None:
    message = f"'{encoder}' cannot be built with an output stride of 16; use another encoder"
    with torch.device("meta"), pytest.raises(ArchitectureError, match=message):
        build_segmenter(encoder, 2)


def test_upsampling_interpolates_linearly_between_cell_centers() -> None:
    row = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert logits_at_stride(row, 4) is row
    assert logits_at_stride(row, 2)[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert logits_at_stride(row, 1)[0, 0, 0].tolist() == [0.0, 0.0, 0.5, 1.5, 2.5, 3.5, 4.0, 4.0]


def test_other_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="stride 3"):
        logits_at_stride(torch.zeros(1, 1, 2, 2), 3)
