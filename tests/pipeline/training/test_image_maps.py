"""Maps of whole images against the truth and slow references: canvases, pixel sizes, the gate, flips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.training.evaluate import (
    predict_image,
)
from tests.models.networks import (
    ConstantClassifier,
    ConstantSegmenter,
)
from tests.pipeline.training.stripes import (
    CornerClassifier,
    bright_corner,
    gated_by_hand,
    image_of,
    predictor,
    stripes,
)


@pytest.mark.parametrize("size", [(64, 64), (150, 203), (30, 41), (5, 90), (1, 1)])
@pytest.mark.parametrize("gate", [True, False])
def test_a_perfect_model_returns_the_truth_of_images_of_any_size(size: tuple[int, int], gate: bool) -> None:
    truth_HW = stripes(*size)
    np.testing.assert_array_equal(predict_image(predictor(), image_of(truth_HW), mpp=1.0, gate=gate), truth_HW)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_map_agrees_with_the_colors_up_to_the_edges_of_regions(stride: int) -> None:
    y, x = np.mgrid[:190, :230]
    truth_HW = ((x - 100) ** 2 + (y - 90) ** 2 < 60**2).astype(np.uint8)
    labels_HW = predict_image(predictor(output_stride=stride), image_of(truth_HW), mpp=1.0)
    distance_HW = np.abs(np.hypot(x - 100, y - 90) - 60)
    assert labels_HW.dtype == np.uint8
    assert (labels_HW != truth_HW).mean() < 0.01
    np.testing.assert_array_equal(labels_HW[distance_HW > 4], truth_HW[distance_HW > 4])


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.999, 2.0])
def test_images_are_resampled_to_the_pixel_size_of_the_model(mpp: float) -> None:
    y, x = np.mgrid[:191, :231]
    truth_HW = ((x - 100) ** 2 + (y - 90) ** 2 < 60**2).astype(np.uint8)
    labels_HW = predict_image(predictor(), image_of(truth_HW), mpp=mpp)
    distance_HW = np.abs(np.hypot(x - 100, y - 90) - 60)
    # A map cell is 4 px at the model's resolution.
    np.testing.assert_array_equal(labels_HW[distance_HW > 5 / mpp], truth_HW[distance_HW > 5 / mpp])
    inside = np.argwhere(labels_HW == 1)
    assert inside.mean(axis=0) == pytest.approx([90, 100], abs=max(0.5, 0.4 / mpp))
    assert len(inside) == pytest.approx(np.pi * 60**2, rel=max(0.01, 0.015 / mpp))


class SeenSegmenter(nn.Module):
    """Predicts class 0 everywhere and keeps the sizes of the canvases."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x_NCHW: Tensor) -> Tensor:
        self.seen.append(tuple(x_NCHW.shape[2:]))
        return F.avg_pool2d(x_NCHW[:, :2], 4) * torch.tensor([0.0, -1.0]).view(1, 2, 1, 1)


@pytest.mark.parametrize(("mpp", "side"), [(1.0, 64), (1.015, 64), (0.985, 64), (1.05, 96), (2.0, 128), (0.5, 32)])
def test_pixel_sizes_within_the_tolerance_are_equal(mpp: float, side: int) -> None:
    segmenter = SeenSegmenter()
    predict_image(predictor(segmenter=segmenter), np.zeros((64, 64, 3), np.uint8), mpp=mpp)
    assert segmenter.seen == [(side + 64, side + 64)]


def test_large_images_are_cut_into_canvases_with_a_margin_of_real_context() -> None:
    segmenter = SeenSegmenter()
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (800, 40, 3), dtype=np.uint8)
    assert not predict_image(predictor(ConstantClassifier([0.9, 0.9]), segmenter), rgb_HWC, mpp=1.0).any()
    assert segmenter.seen == [(768 + 64, 64 + 64), (32 + 64, 64 + 64)]
    truth_HW = stripes(900, 100)
    np.testing.assert_array_equal(predict_image(predictor(), image_of(truth_HW), mpp=1.0), truth_HW)


class SizeSegmenter(nn.Module):
    """Predicts class 1 if the mean red of a 4×4 cell is above one half."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        red_N1hw = F.avg_pool2d(x_NCHW[:, :1], 4)
        return torch.cat([torch.full_like(red_N1hw, 50.0), 100 * red_N1hw], dim=1)


def test_a_finer_image_is_averaged_by_area() -> None:
    # One third of the pixels is bright: the mean of every 3×3 square is below one half, but single pixels are above.
    rgb_HWC = np.zeros((192, 192, 3), np.uint8)
    rgb_HWC[1::3] = 255
    constant = ConstantClassifier([0.9, 0.9])
    assert not predict_image(predictor(constant, SizeSegmenter(), mpp=3.0), rgb_HWC, mpp=1.0).any()
    rgb_HWC[2::3] = 255
    assert (predict_image(predictor(constant, SizeSegmenter(), mpp=3.0), rgb_HWC, mpp=1.0) == 1).all()


def test_the_gate_fades_by_the_windows_over_a_pixel() -> None:
    model, rgb_HWC = gated_by_hand()
    assert (predict_image(model, rgb_HWC, mpp=1.0, gate=False) == 1).all()
    centers = 4 * np.arange(24) + 2  # of the map's cells of 4 px
    gates = np.zeros((2, 24))
    for start in range(-48, 96, 16):
        inside = min(max(start, -32), 64)
        weight_W = np.where((centers > start) & (centers < start + 64), np.sin(np.pi * (centers - start) / 64) ** 2, 0)
        gates += weight_W / 2 * np.array([[inside < 64], [inside > 0]])
    np.testing.assert_allclose(gates.max(axis=0), 1, atol=1e-9)
    first = gates[0] / (gates[0] + np.e * gates[1])
    expected_W = np.interp(np.arange(96) + 0.5, centers, first) < 0.5
    assert 16 < np.flatnonzero(expected_W)[0] < 64
    np.testing.assert_array_equal(predict_image(model, rgb_HWC, mpp=1.0), np.tile(expected_W, (64, 1)))


def test_pixels_without_a_class_after_the_gate_count_as_no_class() -> None:
    networks = ConstantClassifier([0.2, 0.3]), ConstantSegmenter([2.0, 0.0])
    rgb_HWC = np.zeros((70, 80, 3), np.uint8)
    assert (predict_image(predictor(*networks), rgb_HWC, mpp=1.0) == 2).all()
    assert (predict_image(predictor(*networks), rgb_HWC, mpp=1.0, gate=False) == 0).all()
    assert (predict_image(predictor(*networks, ungated_fallback=True), rgb_HWC, mpp=1.0) == 0).all()


@pytest.mark.parametrize("fallback", [False, True])
def test_gated_logits_equal_predict(fallback: bool) -> None:
    model = predictor(ungated_fallback=fallback, batch_size=3)
    rng = np.random.default_rng(3)
    rgb_NHWC = np.stack([image_of(np.full((128, 160), k, np.uint8)) for k in (0, 1, 0, 1, 0)])
    rgb_NHWC[2:] = rng.integers(0, 256, (3, 128, 160, 3))
    corners = [(32 * n, 0) for n in range(5)]
    parts = zip(model.logits(rgb_NHWC), model.presence(rgb_NHWC, corners), corners, strict=True)
    assert torch.equal(torch.stack([model.gated(*part) for part in parts]), model.predict(rgb_NHWC, corners).probs_NKhw)


def test_flips_do_not_change_the_map_of_a_symmetric_model() -> None:
    rng = np.random.default_rng(1)
    truth_HW = rng.integers(0, 2, (8, 10)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    plain_HW, flipped_HW = (predict_image(predictor(), image_of(truth_HW), mpp=1.0, flips=f) for f in (False, True))
    # No pixel center is exactly between two cells of different classes, and corners depend on the last bit.
    assert (plain_HW != flipped_HW).mean() < 0.001


@pytest.mark.parametrize("window", [64, 128, 144])
def test_turned_canvases_have_the_turned_gate_windows(window: int) -> None:
    truth_HW = np.ones((192, 256), np.uint8)
    truth_HW[:150, :200] = 0
    # The segmenter slightly prefers class 1, so a pixel gets class 0 if enough of its windows reject class 1.
    model = predictor(segmenter=ConstantSegmenter([0.0, 0.2]))
    model.card = model.card.model_copy(update={"gate_window": window})
    plain_HW, flipped_HW = (predict_image(model, image_of(truth_HW), mpp=1.0, flips=f) for f in (False, True))
    assert 0.1 < (plain_HW == 0).mean() < 0.6
    assert (plain_HW != flipped_HW).mean() < 0.001


def test_flips_average_all_eight_symmetries_of_a_canvas() -> None:
    torch.manual_seed(0)
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.AvgPool2d(4), nn.Conv2d(4, 2, 5, padding=2))
    model = predictor(ConstantClassifier([0.9, 0.9]), segmenter.requires_grad_(False), output_stride=1)
    rgb_HWC = np.random.default_rng(2).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    total_KHW = np.zeros((2, 64, 64))
    moves: list[tuple[NDArray[np.uint8], Callable[[NDArray[np.float32]], NDArray[np.float32]]]] = [
        (rgb_HWC, lambda p: p),
        (rgb_HWC[::-1], lambda p: p[:, ::-1]),
        (rgb_HWC[:, ::-1], lambda p: p[:, :, ::-1]),
        (rgb_HWC[::-1, ::-1], lambda p: p[:, ::-1, ::-1]),
        (rgb_HWC.swapaxes(0, 1), lambda p: p.swapaxes(1, 2)),
        (rgb_HWC.swapaxes(0, 1)[::-1], lambda p: p[:, ::-1].swapaxes(1, 2)),
        (rgb_HWC.swapaxes(0, 1)[:, ::-1], lambda p: p[:, :, ::-1].swapaxes(1, 2)),
        (rgb_HWC.swapaxes(0, 1)[::-1, ::-1], lambda p: p[:, ::-1, ::-1].swapaxes(1, 2)),
    ]
    for moved_HWC, back in moves:
        around_1HWC = np.pad(moved_HWC[None], [(0, 0), (32, 32), (32, 32), (0, 0)], mode="symmetric")
        total_KHW += back(model.predict(around_1HWC, [(0, 0)]).probs_NKhw[0].numpy())
    clear_HW = np.abs(total_KHW[0] - total_KHW[1]) > 1e-4
    labels_HW = predict_image(model, rgb_HWC, mpp=1.0, flips=True)
    assert clear_HW.mean() > 0.99
    np.testing.assert_array_equal(labels_HW[clear_HW], total_KHW.argmax(axis=0)[clear_HW])
    assert (labels_HW != predict_image(model, rgb_HWC, mpp=1.0)).mean() > 0.002


def test_with_flips_the_gate_goes_by_the_mean_presence() -> None:
    # In two of the eight views, the bright pixel is in the upper left corner of a window: presence 1, 1, six times 0.
    model, rgb_HWC = predictor(CornerClassifier(), ConstantSegmenter([0.0, 9.0])), image_of(bright_corner())
    assert (predict_image(model, rgb_HWC, mpp=1.0) == 1).any()
    assert (predict_image(model, rgb_HWC, mpp=1.0, flips=True) == 0).all()
    assert (predict_image(model, rgb_HWC, mpp=1.0, flips=True, gate=False) == 1).all()
