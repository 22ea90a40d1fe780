from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.training.config import TrainConfig
from tests.bench.second_round import mean_probabilities


class OfColors(nn.Module):
    """Logits of each cell from its mean color."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return 3 * F.avg_pool2d(x_NCHW, 4)[:, :2]


class OfPosition(nn.Module):
    """Logits of each cell from its place alone."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        height, width = x_NCHW.shape[2] // 4, x_NCHW.shape[3] // 4
        y_hw, x_hw = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([y_hw / 9, x_hw / 50]).expand(len(x_NCHW), 2, height, width).float()


def test_each_map_is_moved_back_before_the_mean() -> None:
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    probs_KHW = mean_probabilities(OfColors(), rgb_HWC, TrainConfig())
    assert probs_KHW.shape == (2, 64, 96)
    np.testing.assert_allclose(probs_KHW.sum(axis=0), 1, rtol=1e-6)
    logits_1KHW = OfColors()(torch.from_numpy(rgb_HWC).permute(2, 0, 1)[None] / 127.5 - 1)
    up_1KHW = F.interpolate(logits_1KHW, scale_factor=4, mode="bilinear", align_corners=False)
    # At the edges, the mirrored margin takes part in the interpolation.
    np.testing.assert_allclose(
        probs_KHW[:, 4:-4, 4:-4], up_1KHW.softmax(dim=1)[0, :, 4:-4, 4:-4].numpy(), rtol=0, atol=1e-5
    )


def test_the_mean_over_the_symmetries_has_them() -> None:
    blank_HWC = np.zeros((64, 64, 3), np.uint8)
    probs_KHW = mean_probabilities(OfPosition(), blank_HWC, TrainConfig())
    first_HW = probs_KHW[0]
    assert np.ptp(first_HW) > 0.02, "the map depends on the position"
    for turns in range(4):
        np.testing.assert_allclose(np.rot90(first_HW, turns), first_HW, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.rot90(first_HW, turns)[:, ::-1], first_HW, rtol=0, atol=1e-6)
