from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.card import NO_DIGEST
from models.errors import NonFiniteOutputError
from models.gate import presence
from models.predictor import Predictor
from tests.models.networks import (
    ColorClassifier,
    ColorSegmenter,
    ConstantClassifier,
    ConstantSegmenter,
    PixelClassifier,
    make_card,
)

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def color_predictor(**options: Any) -> Predictor:
    return Predictor(
        make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS), device="cpu", **options
    )


def constant_predictor(presence_K: list[float], logits_K: list[float], **options: Any) -> Predictor:
    networks = ConstantClassifier(presence_K), ConstantSegmenter(logits_K)
    return Predictor(make_card(COLORS[: len(logits_K)]), NO_DIGEST, *networks, device="cpu", **options)


CORNERS = [(0, 0)] * 4


def painted_cores() -> np.ndarray:
    """Return canvases whose cores are: one color, two side by side, three in rows, and a single color again.

    Beyond the core, a canvas has the nearest colors of its core.
    """
    cores_NHWC = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    cores_NHWC[0], cores_NHWC[3] = COLORS[1], COLORS[2]
    cores_NHWC[1, :, :32], cores_NHWC[1, :, 32:] = COLORS[0], COLORS[2]
    cores_NHWC[2, :16], cores_NHWC[2, 16:40], cores_NHWC[2, 40:] = COLORS
    return np.pad(cores_NHWC, [(0, 0), (32, 32), (32, 32), (0, 0)], mode="edge")


def test_colors_come_back_as_classes() -> None:
    prediction = color_predictor().predict(painted_cores(), CORNERS)
    assert prediction.segmented_N.tolist() == [False, True, True, False]
    labels_Nhw = prediction.probs_NKhw.argmax(dim=1)
    assert (labels_Nhw[0] == 1).all()
    assert (labels_Nhw[3] == 2).all()
    assert (labels_Nhw[1, :, :8] == 0).all()
    assert (labels_Nhw[1, :, 8:] == 2).all()
    assert labels_Nhw[2, :, 0].tolist() == [0] * 4 + [1] * 6 + [2] * 6


def test_presence_is_read_in_windows_at_every_16th_pixel() -> None:
    columns_RCK, rows_RCK = (one > 0.5 for one in color_predictor().presence(painted_cores()[1:3], CORNERS[:2]))
    assert columns_RCK.shape == rows_RCK.shape == (7, 7, 3)
    # Windows of 64 px start at -48 to 48. The canvas has pixels from -32 to 96, so the first and last are moved inside.
    starts = [-32, -32, -16, 0, 16, 32, 32]
    for place, start in enumerate(starts):
        assert columns_RCK[3, place].tolist() == [start < 32, False, start + 64 > 32]
        assert rows_RCK[place, 3].tolist() == [start < 16, start + 64 > 16 and start < 40, start + 64 > 40]
    assert torch.equal(columns_RCK, columns_RCK[3].expand(7, 7, 3))
    assert torch.equal(rows_RCK, rows_RCK[:, 3:4].expand(7, 7, 3))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_skipping_by_gate_changes_no_probability(stride: int) -> None:
    skipping = color_predictor(output_stride=stride).predict(painted_cores(), CORNERS)
    running = color_predictor(output_stride=stride, skip_by_gate=False).predict(painted_cores(), CORNERS)
    assert torch.equal(skipping.probs_NKhw, running.probs_NKhw)
    assert running.segmented_N.all()
    assert skipping.probs_NKhw.shape == (4, 3, 64 // stride, 64 // stride)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    rgb_NHWC = np.random.default_rng(0).integers(0, 256, (7, 96, 128, 3), dtype=np.uint8)
    corners = [(32 * n, 0) for n in range(7)]
    expected = color_predictor().predict(rgb_NHWC, corners)
    actual = color_predictor(batch_size=batch_size).predict(rgb_NHWC, corners)
    assert torch.allclose(actual.probs_NKhw, expected.probs_NKhw, atol=1e-6)
    assert np.array_equal(actual.segmented_N, expected.segmented_N)


def test_constant_networks_give_the_renormalized_softmax() -> None:
    predictor = constant_predictor([0.9, 0.2, 0.8], [1.0, 9.0, 2.0])
    prediction = predictor.predict(painted_cores(), CORNERS)
    presence_RCK = predictor.presence(painted_cores(), CORNERS)[0]
    expected_K = torch.tensor([1.0, 0.0, math.e]) / (1 + math.e)
    assert torch.allclose(prediction.probs_NKhw, expected_K.view(1, 3, 1, 1).expand(4, 3, 16, 16))
    assert presence_RCK[0, 0].tolist() == pytest.approx([0.9, 0.2, 0.8])
    assert presence_RCK.dtype == torch.float32


def test_a_canvas_without_a_passing_class_is_not_segmented() -> None:
    prediction = constant_predictor([0.1, 0.2], [1.0, 2.0]).predict(painted_cores(), CORNERS)
    assert (prediction.probs_NKhw == 0).all()
    assert not prediction.segmented_N.any()


def test_ungated_fallback_gives_the_plain_softmax_if_no_class_passes() -> None:
    predictor = constant_predictor([0.1, 0.2], [0.0, 1.0], ungated_fallback=True)
    prediction = predictor.predict(painted_cores(), CORNERS)
    assert torch.allclose(prediction.probs_NKhw[:, 1], torch.tensor(1.0).sigmoid())
    assert prediction.segmented_N.all()


class _Poisoned(PixelClassifier):
    """Returns NaN for images that contain a white pixel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_NCHW: Tensor) -> Tensor:
        output: Tensor = self.network(x_NCHW)
        white_N = (x_NCHW == 1).all(dim=1).flatten(1).any(dim=1)
        return output.masked_fill(white_N.view(-1, *[1] * (output.ndim - 1)), torch.nan)


@pytest.mark.parametrize("network", ["classifier", "segmenter"])
def test_non_finite_output_names_the_canvases(network: str) -> None:
    networks: dict[str, Any] = {
        "classifier": ConstantClassifier([0.9] * 3),
        "segmenter": ConstantSegmenter([0.0] * 3),
    }
    networks[network] = _Poisoned(networks[network])
    rgb_NHWC = np.repeat(painted_cores(), 2, axis=0)
    rgb_NHWC[[2, 7], 40, 40] = 255
    predictor = Predictor(make_card(COLORS), NO_DIGEST, **networks, device="cpu", batch_size=3)
    with pytest.raises(NonFiniteOutputError, match=network) as caught:
        predictor.predict(rgb_NHWC, CORNERS * 2)
    assert caught.value.indices == (2, 7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_float32(precision: Any) -> None:
    expected = color_predictor().predict(painted_cores(), CORNERS).probs_NKhw
    actual = color_predictor(precision=precision).predict(painted_cores(), CORNERS).probs_NKhw
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, expected, atol=0.05)


def test_invalid_arguments_are_refused_with_the_allowed_values() -> None:
    with pytest.raises(ValueError, match="float32, bf16 or fp16"):
        color_predictor(precision="int3")
    with pytest.raises(
        ValueError, match=re.escape("expected uint8 RGB canvases (N, H, W, 3), got float64 (1, 8, 8, 3)")
    ):
        color_predictor().predict(np.zeros((1, 8, 8, 3)), [(0, 0)])  # type: ignore[arg-type]
    for height, width in ((64, 96), (96, 100)):
        with pytest.raises(ValueError, match=f"canvases have {height}x{width} px; sides are multiples of 32 above 64"):
            color_predictor().predict(np.zeros((1, height, width, 3), np.uint8), [(0, 0)])


def test_default_bundle_predicts_the_same_twice() -> None:
    bundle = load_bundle(DEFAULT_BUNDLE)
    predictor = Predictor.from_bundle(bundle, device="cpu", batch_size=2, skip_by_gate=False)
    assert predictor.digest == bundle.digest
    rgb_NHWC = np.random.default_rng(1).integers(0, 256, (2, 160, 192, 3), dtype=np.uint8)
    corners = [(0, 0), (32, 64)]
    with predictor.lock:
        first, second = predictor.predict(rgb_NHWC, corners), predictor.predict(rgb_NHWC, corners)
    assert torch.equal(first.probs_NKhw, second.probs_NKhw)
    total_Nhw = first.probs_NKhw.sum(dim=1)
    assert ((total_Nhw >= 0) & (total_Nhw <= 1 + 1e-6)).all()
    assert total_Nhw.max() > 0.99


def test_probabilities_have_the_same_bits_in_any_number_of_windows() -> None:
    """torch computes the last values of a sigmoid on a CPU with other instructions than the others."""
    logits_MK = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 5
    whole_MK = presence(logits_MK)
    for count in range(1, 100):
        assert torch.equal(presence(logits_MK[:count]), whole_MK[:count])
    torch.testing.assert_close(whole_MK, logits_MK.sigmoid())


@pytest.mark.parametrize("compiles", [True, False])
def test_convolutions_avoid_cudnn_if_it_compiles_sizes(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    used = set()
    forward = nn.Conv2d._conv_forward

    def recorded(self: nn.Conv2d, *arguments: Any) -> Tensor:
        used.add(torch.backends.cudnn.enabled)
        result: Tensor = forward(self, *arguments)
        return result

    monkeypatch.setattr("models.device_networks.compiles_sizes", lambda *_: compiles)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", recorded)
    bundle = load_bundle(DEFAULT_BUNDLE)
    model = Predictor.from_bundle(bundle, device="cpu", runtime="torch", skip_by_gate=False)
    model.predict(np.zeros((1, 256, 256, 3), np.uint8), [(0, 0)])
    assert used == {not compiles}
    assert torch.backends.cudnn.enabled
