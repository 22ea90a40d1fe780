from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.gate import passing_classes, presence
from pipeline.training.config import TrainConfig
from pipeline.training.gate_calibration import (
    UNCALIBRATED,
    calibrate_gate,
    gate_window,
    patch_presence,
    warn_of_uncalibrated,
)
from pipeline.training.inputs import as_input
from tests.pipeline.training.cells import CellClassifier, crop_images


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_threshold_is_the_largest_that_accepts_the_required_share_of_tiles(
    seed: int, count: int, recall: float
) -> None:
    rng = np.random.default_rng(seed)
    presence_NK = rng.beta(2, 1, (count, 2)).astype(np.float32)
    held_NK = rng.random((count, 2)) < 0.7
    for k, threshold in enumerate(calibrate_gate(presence_NK, held_NK, recall)):
        held = presence_NK[held_NK[:, k], k]
        if not len(held):
            assert threshold == UNCALIBRATED
            continue
        assert (held > np.float32(threshold)).mean() >= recall - 1e-9
        assert (held > threshold + 2e-4).mean() < recall


def test_no_threshold_accepts_a_presence_of_exactly_0() -> None:
    presence_NK = presence(torch.tensor([[-200.0, -100.0], [-200.0, 3.0], [2.0, 2.0]]))
    assert presence_NK[0, 0] == 0 < presence_NK[0, 1]
    thresholds = calibrate_gate(presence_NK.numpy(), np.ones((3, 2), np.bool_), 1.0)
    # The smallest threshold, which rejects 0 and accepts every other probability.
    assert thresholds == (0.0, 0.0)
    passed_NK = passing_classes(presence_NK, torch.tensor(thresholds))
    assert passed_NK.tolist() == [[False, True], [False, True], [True, True]]


def test_a_class_without_tiles_gets_the_threshold_of_the_paper() -> None:
    presence_NK = np.array([[0.9, 0.8], [0.3, 0.7]], np.float32)
    held_NK = np.array([[True, False], [True, False]])
    assert calibrate_gate(presence_NK, held_NK, 1.0) == (0.2999, 0.1)
    assert calibrate_gate(presence_NK, held_NK, 0.5) == (0.8999, 0.1)


def test_a_warning_names_the_classes_without_a_validation_patch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = crop_images(tmp_path, {"a": (64, 32), "b": (32, 32)}, side=32, stride=32)
    images.present = [np.array([[True, False, False], [True, False, True]]), np.array([[False, True, False]])]
    warn_of_uncalibrated(images)
    assert not caplog.messages
    images.present[0][1, 2] = images.present[1][0, 1] = False
    warn_of_uncalibrated(images)
    (message,) = caplog.messages
    assert "no validation patch has class blue, orange; without such patches, the gate threshold of a class is 0.1" in (
        message
    )


def test_the_gate_is_calibrated_on_all_labeled_patches(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (112, 64), "b": (32, 32)}, side=32, stride=16)
    classifier, config = CellClassifier("gap"), TrainConfig(region=64)
    presence_MK, held_MK = patch_presence(classifier, images, config, torch.device("cpu"))
    np.testing.assert_array_equal(held_MK, np.concatenate(images.present))
    for index, (x, y, w, h) in ((3, images.boxes[0][3].tolist()), (len(images.boxes[0]), images.boxes[1][0].tolist())):
        image = int(index >= len(images.boxes[0]))
        x_NCHW = as_input(images.rgb(image)[None, y : y + h, x : x + w].copy(), torch.device("cpu"), config)
        # The features of these cells do not depend on their surroundings.
        with torch.inference_mode():
            alone_K = classifier(x_NCHW)[0].sigmoid().numpy()
        np.testing.assert_allclose(presence_MK[index], alone_K, atol=1e-5)


@pytest.mark.parametrize(("side", "window"), [(32, 32), (40, 32), (75, 80), (224, 224), (8, 16)])
def test_the_gate_reads_windows_of_the_size_of_the_labeled_patches(tmp_path: Path, side: int, window: int) -> None:
    assert gate_window(crop_images(tmp_path, {"a": (224, 224)}, side=side, stride=side)) == window
