from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import TrainConfigError
from pipeline.training.config import TrainConfig
from pipeline.training.position import edge_profile, measures_position, position_metrics, ring_means
from tests.pipeline.training.cells import crop_images

CPU = torch.device("cpu")


class Local(nn.Module):
    """A segmenter whose logits are the colors of each cell, plus a bias toward class 0 near the edge."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NKhw = 4 * F.avg_pool2d(x_NCHW, 4)
        height, width = logits_NKhw.shape[2:]
        rows, columns = (torch.minimum(torch.arange(n), torch.arange(n).flip(0)) for n in (height, width))
        near_hw = torch.minimum(rows[:, None], columns) < 12  # cells of 4 px: 48 px
        logits_NKhw[:, 0] += self.bias * near_hw
        return logits_NKhw


def test_the_mean_over_a_ring_is_that_of_its_cells() -> None:
    map_hw = np.arange(25.0).reshape(5, 5)
    inner = map_hw[1:4, 1:4]
    outer = (map_hw.sum() - inner.sum()) / 16
    np.testing.assert_allclose(ring_means(map_hw[None], 1), [[outer, (inner.sum() - 12) / 8, 12]])
    np.testing.assert_allclose(ring_means(map_hw[None], 2)[0, 0], (map_hw.sum() - 12) / 24)


def test_a_network_that_sees_only_colors_has_a_flat_profile(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (96, 64), "b": (64, 96)})
    config = TrainConfig(view=160, margin=32, position_views=400)
    flat = edge_profile(Local(0.0), images, config, CPU)
    assert flat.shape == (3, 5)
    np.testing.assert_allclose(flat.sum(axis=0), 1, rtol=1e-5)
    assert position_metrics(flat, config.margin)["val_position_deviation"] < 0.03
    assert np.ptp(flat.mean(axis=1)) > 0.01 or flat.std() > 0


def test_a_bias_inside_the_trusted_part_is_found_and_one_in_the_margin_is_not(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (96, 64)})
    biased = edge_profile(Local(3.0), images, TrainConfig(view=160, margin=32, position_views=60), CPU)
    assert position_metrics(biased, 32)["val_position_deviation"] > 0.2
    assert position_metrics(biased, 48)["val_position_deviation"] < 0.1


def test_the_log_names_the_setting_before_the_views_are_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = crop_images(tmp_path, {"a": (96, 64)})
    with caplog.at_level("INFO"):
        edge_profile(Local(0.0), images, TrainConfig(view=160, margin=32, position_views=2), CPU)
    assert caplog.messages == [
        "measuring whether the map depends on the position in a view, with 2 views of 160 px (setting position_views); "
        "this can take minutes on a CPU"
    ]


def test_a_single_ring_beyond_the_margin_has_no_deviation() -> None:
    profile_KD = np.array([[0.9, 0.5, 0.25, 0.5], [0.1, 0.5, 0.75, 0.5]])
    assert position_metrics(profile_KD, 48) == {}
    assert position_metrics(profile_KD, 32) == {"val_position_deviation": 0.125}
    assert not measures_position(TrainConfig(view=128, margin=48))
    assert measures_position(TrainConfig(view=128, margin=32))


@pytest.mark.parametrize(("view", "margin"), [(128, 64), (100, 32), (160, 8)])
def test_views_without_a_trusted_part_are_refused(view: int, margin: int) -> None:
    with pytest.raises(TrainConfigError, match=r"view is|margin is"):
        TrainConfig(view=view, margin=margin)
