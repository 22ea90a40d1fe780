from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from pipeline.training.dataset import load_dataset, samples
from tests.bench.sharper_masks import GLAND, allowed, guided, superpixels
from tests.textures import write_crops


def test_a_guided_filter_keeps_what_is_linear_in_its_guide_and_averages_the_rest() -> None:
    rng = np.random.default_rng(0)
    guide_HW = rng.random((40, 50))
    rgb_HWC = np.zeros((40, 50, 3), np.uint8)
    linear = guided(lambda _: guide_HW, 4, 1e-9)
    np.testing.assert_allclose(linear(rgb_HWC, 0.3 * guide_HW + 0.2), 0.3 * guide_HW + 0.2, atol=1e-6)
    probs_HW = rng.random((40, 50))
    # A flat guide explains nothing: the mean over a square remains, averaged over the squares around a pixel.
    flat = guided(lambda _: np.full((40, 50), 0.5), 4, 1e-3)
    box = scipy.ndimage.uniform_filter
    np.testing.assert_allclose(flat(rgb_HWC, probs_HW), box(box(probs_HW, 9), 9), atol=1e-9)


def test_a_superpixel_gets_its_mean() -> None:
    rgb_HWC = np.full((40, 80, 3), 30, np.uint8)
    rgb_HWC[:, 40:] = 220
    probs_HW = np.random.default_rng(0).random((40, 80))
    found_HW = superpixels(400, 5)(rgb_HWC, probs_HW)
    assert found_HW.mean() == pytest.approx(probs_HW.mean())
    # Several pieces; images are smoothed first, so those at the edge may reach a few pixels across.
    assert len(np.unique(found_HW)) >= 4
    for value in np.unique(found_HW):
        assert probs_HW[found_HW == value].mean() == pytest.approx(value)
    assert not set(np.unique(found_HW[:, :36])) & set(np.unique(found_HW[:, 44:]))


def test_pixels_whose_patches_allow_one_class_have_this_class(tmp_path: Path) -> None:
    dataset = load_dataset(write_crops(tmp_path, {"a": (96, 64)}, side=32, stride=32))
    (sample,) = samples(dataset, "train")
    probs_HW = np.full((64, 96), 0.4, np.float32)
    # Each column of patches has one of the three classes.
    expected_HW = np.zeros((64, 96))
    expected_HW[:, 32 * GLAND : 32 * (GLAND + 1)] = 1
    np.testing.assert_array_equal(allowed(dataset, sample, probs_HW), expected_HW)
    wide = load_dataset(write_crops(tmp_path / "wide", {"a": (96, 64)}, side=64, stride=32))
    (sample,) = samples(wide, "train")
    # Patches of 64 px have two classes, and every one of them has the class in the middle. It is the only one that
    # both patches over the middle contain.
    found_HW = allowed(wide, sample, probs_HW)
    np.testing.assert_array_equal(found_HW[:, 32:64], 1)
    np.testing.assert_array_equal(found_HW[:, :32], probs_HW[:, :32])
    np.testing.assert_array_equal(found_HW[:, 64:], probs_HW[:, 64:])
