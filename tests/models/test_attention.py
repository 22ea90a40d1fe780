"""Progressive dropout attention (PDA) and its schedules against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.heads import PDA_SCHEDULES, PdaSchedule, progressive_dropout_attention
from tests.models.slow_heads import Floats, slow_class_maps


def slow_attention(deep_NChw: Floats, weight_KC: Floats, mu: float) -> Floats:
    images, _, height, width = deep_NChw.shape
    attention = np.zeros((images, 1, height, width))
    for n in range(images):
        for cam_hw in np.maximum(slow_class_maps(deep_NChw[n], weight_KC), 0):
            beta = mu * cam_hw.max()
            for y in range(height):
                for x in range(width):
                    attention[n, 0, y, x] += (0.0 if cam_hw[y, x] > beta else cam_hw[y, x]) / len(weight_KC)
    return attention


@pytest.mark.parametrize("mu", [1.0, 0.83, 0.65])
@pytest.mark.parametrize("normalize", [False, True])
def test_attention_agrees_with_the_definition(mu: float, normalize: bool) -> None:
    rng = np.random.default_rng(1)
    deep_NChw, weight_KC = rng.normal(size=(3, 5, 4, 6)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    actual = progressive_dropout_attention(
        torch.from_numpy(deep_NChw), torch.from_numpy(weight_KC), mu, normalize=normalize
    )
    expected = slow_attention(deep_NChw.astype(np.float64), weight_KC.astype(np.float64), mu)
    if normalize:
        for n in range(3):
            expected[n] /= expected[n].max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_image_without_any_positive_class_map_keeps_its_features_if_normalized() -> None:
    deep_NChw = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    deep_NChw[1] *= -1
    weight_KC = torch.ones(2, 5)
    plain = progressive_dropout_attention(deep_NChw, weight_KC, 0.8)
    normalized = progressive_dropout_attention(deep_NChw, weight_KC, 0.8, normalize=True)
    assert float(plain[1].abs().max()) == 0
    assert torch.equal(normalized[1], torch.ones(1, 4, 4))
    assert torch.allclose(normalized[0], plain[0] / plain[0].max())


def test_attention_is_computed_in_float32_for_half_precision_features() -> None:
    generator = torch.Generator().manual_seed(2)
    deep_NChw, weight_KC = torch.rand(1, 4, 3, 3, generator=generator).bfloat16(), torch.rand(2, 4, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = progressive_dropout_attention(deep_NChw, weight_KC, 0.9)
    assert attention.dtype == torch.float32
    assert torch.equal(attention, progressive_dropout_attention(deep_NChw.float(), weight_KC, 0.9))


def epoch_by_epoch(sigma: float, lower: float, held: int, epochs: int) -> list[float]:
    """Return mu of each epoch by a loop: after `held` epochs, multiply after each epoch while mu is above the bound."""
    mu, values = 1.0, []
    for epoch in range(epochs):
        values.append(mu)
        if epoch + 1 >= held and mu > lower:
            mu = max(lower, mu * sigma)
    return values


def test_the_paper_schedule_of_20_epochs_holds_one_for_three_epochs_and_then_decays() -> None:
    paper = PDA_SCHEDULES["paper"]
    assert [paper.mu(epoch, 20) for epoch in range(6)] == pytest.approx([1, 1, 1, 0.985, 0.970225, 0.955671625])
    assert [paper.mu(epoch, 20) for epoch in range(20)] == pytest.approx(epoch_by_epoch(0.985, 0.65, 3, 20))


def test_the_release_schedule_decays_after_epoch_0_and_applies_from_epoch_3() -> None:
    release = PDA_SCHEDULES["release"]
    expected = [None, None, None, *epoch_by_epoch(0.98, 0.65, 1, 20)[3:]]
    assert [release.mu(epoch, 20) for epoch in range(20)] == pytest.approx(expected)
    assert release.mu(5, 20) == pytest.approx(0.98**5)


@pytest.mark.parametrize("name", list(PDA_SCHEDULES))
def test_a_schedule_takes_the_values_at_the_same_shares_of_a_training_of_any_length(name: str) -> None:
    schedule = PDA_SCHEDULES[name]
    assert [schedule.mu(epoch, 4) for epoch in range(4)] == [schedule.mu(epoch, 20) for epoch in (0, 5, 10, 15)]
    assert [schedule.mu(epoch, 40) for epoch in range(0, 40, 2)] == [schedule.mu(epoch, 20) for epoch in range(20)]


def test_mu_never_falls_below_its_lower_bound() -> None:
    steep = PdaSchedule(sigma=0.9, lower=0.65, hold=1, start=0)
    assert [steep.mu(epoch, 20) for epoch in (4, 5, 19)] == pytest.approx([0.9**4, 0.65, 0.65])
