from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.training.resample import resampled
from wsi.levels import MPP_TOLERANCE

RGB_HWC = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_reducing_by_an_integer_factor_averages_squares(factor: int) -> None:
    expected_HWC = RGB_HWC.reshape(24 // factor, factor, 36 // factor, factor, 3).mean(axis=(1, 3))
    found_HWC = resampled(RGB_HWC, 1 / factor)
    assert found_HWC.shape == expected_HWC.shape
    assert np.abs(found_HWC - expected_HWC).max() <= 1  # Pillow rounds rows, then columns


def test_reducing_by_a_fraction_is_pillows_box_filter_at_the_rounded_size() -> None:
    found_HWC = resampled(RGB_HWC, 0.6)
    assert found_HWC.shape == (14, 22, 3)
    expected_HWC = np.asarray(Image.fromarray(RGB_HWC).resize((22, 14), Image.Resampling.BOX))
    np.testing.assert_array_equal(found_HWC, expected_HWC)


def test_enlarging_is_bicubic_and_repeats_no_pixels() -> None:
    ramp_HWC = np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (10, 30, 3)).copy()
    found_HWC = resampled(ramp_HWC, 2.0)
    expected_HWC = np.asarray(Image.fromarray(ramp_HWC).resize((60, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found_HWC, expected_HWC)
    # With aligned pixel centers, column x of the enlarged ramp is at (x + 1/2) / 2 - 1/2 of the original.
    np.testing.assert_allclose(found_HWC[5, 4:-4, 0], (np.arange(4, 56) + 0.5) / 2 * 8 - 4, atol=1.0)


@pytest.mark.parametrize("scale", [1.0, 1 + MPP_TOLERANCE * 0.99, 1 - MPP_TOLERANCE * 0.99])
def test_within_the_tolerance_an_image_is_unchanged(scale: float) -> None:
    assert resampled(RGB_HWC, scale) is RGB_HWC


def test_beyond_the_tolerance_an_image_is_resampled() -> None:
    assert resampled(np.zeros((100, 100, 3), np.uint8), 1 - MPP_TOLERANCE * 1.5).shape != (100, 100, 3)


def test_no_image_becomes_empty() -> None:
    assert resampled(RGB_HWC[:1], 0.1).shape == (1, 4, 3)
