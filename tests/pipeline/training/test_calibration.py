from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.card import NO_DIGEST
from models.predictor import Predictor
from pipeline.training.calibration import (
    HIGHEST,
    LOWEST,
    calibrate_temperature,
    fitted_temperature,
    labeled_logits,
    reliability,
    write_reliability,
)
from pipeline.training.dataset import IGNORED, load_dataset, read_mask, samples
from pipeline.training.patches import PatchImages
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.training.stripes import COLORS, stripes, write_dataset


def drawn(temperature: float, count: int = 40000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are `temperature` times those of the distribution that the classes are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    true_NK = 1.5 * torch.randn(count, 3, generator=generator)
    truth_N = torch.multinomial(true_NK.softmax(dim=1), 1, generator=generator)[:, 0]
    return true_NK * temperature, truth_N


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_fitted_temperature_recovers_the_scale_of_the_logits(temperature: float) -> None:
    logits_NK, truth_N = drawn(temperature)
    assert fitted_temperature(logits_NK, truth_N) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0, 300.0, 1e6])
def test_the_temperature_of_pixels_that_are_all_correct_ends_at_its_lower_bound(scale: float) -> None:
    # At low temperatures the loss is exactly 0, so a whole range of temperatures has the lowest loss.
    truth_N = torch.arange(300) % 3
    logits_NK = scale * F.one_hot(truth_N, 3).float()
    assert fitted_temperature(logits_NK, truth_N) == pytest.approx(LOWEST, rel=1e-3)


@given(st.integers(0, 2**32 - 1))
def test_no_other_temperature_has_a_lower_loss(seed: int) -> None:
    logits_NK, truth_N = drawn(2.0, 300, seed % 2**31)
    best = fitted_temperature(logits_NK, truth_N)
    loss = F.cross_entropy(logits_NK / best, truth_N)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert F.cross_entropy(logits_NK / (best * factor), truth_N) > loss - 1e-6


def slow_error(probs_NK: torch.Tensor, truth_N: torch.Tensor, bins: int) -> float:
    """Return the expected calibration error by its definition (Guo et al. 2017, equation 5)."""
    confidence_N, predicted_N = probs_NK.double().max(dim=1)
    total = 0.0
    for b in range(bins):
        inside = [
            (float(c), int(p == t))
            for c, p, t in zip(confidence_N, predicted_N, truth_N, strict=True)
            if b / bins <= float(c) < (b + 1) / bins or (b == bins - 1 and float(c) == 1)
        ]
        if inside:
            confidence, correct = np.mean(inside, axis=0)
            total += len(inside) / len(truth_N) * abs(confidence - correct)
    return total


def test_the_calibration_error_agrees_with_its_definition() -> None:
    logits_NK, truth_N = drawn(2.0, 500)
    probs_NK = logits_NK.softmax(dim=1)
    probs_NK[0] = torch.tensor([0.0, 0.0, 1.0])
    found = reliability(probs_NK, truth_N)
    assert found.error == pytest.approx(slow_error(probs_NK, truth_N, 15), abs=1e-9)
    assert found.count_B.sum() == 500


def test_calibrated_predictions_have_almost_no_error_and_overconfident_ones_have_one() -> None:
    logits_NK, truth_N = drawn(1.0)
    assert reliability(logits_NK.softmax(dim=1), truth_N).error < 0.01
    assert reliability((3 * logits_NK).softmax(dim=1), truth_N).error > 0.1


def test_an_overconfident_segmenter_gets_a_temperature_that_lowers_its_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wrong = stripes(64, 64)
    # The image shows the wrong class in a fifth of the cells of 4x4 px, which the segmenter cannot know.
    flipped_hw = rng.random((16, 16)) < 0.2
    dataset = load_dataset(write_dataset(tmp_path, {"one": wrong}))
    (sample,) = samples(dataset, "test")
    mask_HW = wrong ^ np.kron(flipped_hw, np.ones((4, 4), np.uint8)).astype(np.uint8)
    assert sample.mask is not None
    Image.fromarray(mask_HW).save(sample.mask)
    np.testing.assert_array_equal(read_mask(dataset, sample), mask_HW)
    images = PatchImages(dataset, (sample,), 1.0)
    predictor = Predictor(make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS, 40.0))
    logits_NK, truth_N = labeled_logits(predictor, images)
    assert (logits_NK.argmax(dim=1) == truth_N).double().mean() == pytest.approx(1 - flipped_hw.mean())
    found = calibrate_temperature(predictor, images)
    assert found.temperature > 2
    assert found.before is not None
    assert found.after is not None
    assert found.metrics() == {
        "val_ece_uncalibrated": round(found.before.error, 4),
        "val_ece": round(found.after.error, 4),
    }
    assert found.after.error < found.before.error / 2
    write_reliability(tmp_path / "calibration.png", found)
    with Image.open(tmp_path / "calibration.png") as picture:
        assert picture.size == (450, 400)


def test_without_masks_the_temperature_stays_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"one": stripes(64, 64)}))
    images = PatchImages(dataset, samples(dataset, "train"), 1.0)
    predictor = Predictor(make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS, 400.0))
    found = calibrate_temperature(predictor, images)
    assert (found.temperature, found.metrics()) == (1.0, {})
    assert "the temperature stays 1" in caplog.text
    write_reliability(tmp_path / "calibration.png", found)
    assert not (tmp_path / "calibration.png").exists()


@pytest.mark.parametrize(("reversed_colors", "bound"), [(False, LOWEST), (True, HIGHEST)])
def test_a_temperature_at_a_bound_of_its_range_gets_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reversed_colors: bool, bound: float
) -> None:
    """The masks contain one class only, which the segmenter always or never predicts."""
    dataset = load_dataset(write_dataset(tmp_path, {"one": np.zeros((64, 64), np.uint8)}))
    images = PatchImages(dataset, samples(dataset, "test"), 1.0)
    colors = COLORS[::-1] if reversed_colors else COLORS
    predictor = Predictor(make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(colors, 0.5))
    assert calibrate_temperature(predictor, images).temperature == pytest.approx(bound, rel=1e-3)
    (message,) = caplog.messages
    assert "a bound of its range (0.05 to 20.0), so the probabilities are not calibrated; the validation masks" in (
        message
    )


def test_without_a_pixel_with_a_class_the_temperature_stays_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"one": np.full((64, 64), IGNORED, np.uint8)}))
    images = PatchImages(dataset, samples(dataset, "test"), 1.0)
    predictor = Predictor(make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS, 400.0))
    found = calibrate_temperature(predictor, images)
    assert (found.temperature, found.metrics()) == (1.0, {})
    assert "the temperature stays 1 because no pixel of the validation masks has a class" in caplog.text
