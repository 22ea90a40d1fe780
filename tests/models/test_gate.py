from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.gate import masked_softmax, passing_classes


def gated_probabilities(
    logits_NKhw: torch.Tensor, presence_NK: torch.Tensor, thresholds_K: torch.Tensor
) -> torch.Tensor:
    return masked_softmax(logits_NKhw, passing_classes(presence_NK, thresholds_K))


@st.composite
def gate_inputs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits_NKhw = torch.randn(images, classes, 3, 5, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0, 1e4]))
    return logits_NKhw, torch.rand(images, classes, generator=generator), torch.rand(classes, generator=generator)


@given(gate_inputs())
def test_gated_classes_are_zero_and_the_others_sum_to_one(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, presence_NK, thresholds_K = inputs
    probs_NKhw = gated_probabilities(*inputs)
    passed_NK = presence_NK > thresholds_K
    assert (probs_NKhw[~passed_NK] == 0).all()
    total_Nhw = probs_NKhw.sum(dim=1)
    assert torch.allclose(total_Nhw, passed_NK.any(dim=1).float()[:, None, None].expand_as(total_Nhw))
    assert probs_NKhw.dtype == torch.float32


@given(gate_inputs())
def test_gate_is_renormalised_probabilities(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    logits_NKhw, presence_NK, thresholds_K = inputs
    logits_NKhw = logits_NKhw.clamp(-20, 20)
    kept_NKhw = logits_NKhw.double().softmax(dim=1) * (presence_NK > thresholds_K)[:, :, None, None]
    total_N1hw = kept_NKhw.sum(dim=1, keepdim=True)
    expected_NKhw = torch.where(total_N1hw > 0, kept_NKhw / total_N1hw.clamp_min(1e-300), 0.0)
    np.testing.assert_allclose(gated_probabilities(logits_NKhw, presence_NK, thresholds_K), expected_NKhw, atol=1e-5)


@given(gate_inputs(), st.integers(0, 1))
def test_single_passing_class_is_exactly_one_whatever_its_logits(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], only: int
) -> None:
    logits_NKhw, presence_NK, thresholds_K = inputs
    presence_NK = torch.zeros_like(presence_NK)
    presence_NK[:, only] = 1.0
    probs_NKhw = gated_probabilities(logits_NKhw, presence_NK, thresholds_K.clamp(0.1, 0.9))
    assert (probs_NKhw[:, only] == 1.0).all()
    assert probs_NKhw.sum() == logits_NKhw[:, 0].numel()


def test_gated_class_does_not_win_over_negative_logits() -> None:
    """The published code multiplies logits by 0, so that a gated class beats every class with negative logits."""
    logits_NKhw = torch.tensor([-1.0, -5.0, -9.0]).view(1, 3, 1, 1)
    probs_NKhw = gated_probabilities(logits_NKhw, torch.tensor([[0.0, 0.9, 0.9]]), torch.full((3,), 0.1))
    assert probs_NKhw.argmax(dim=1).item() == 1


def test_probability_equal_to_the_threshold_is_gated() -> None:
    assert passing_classes(torch.tensor([[0.25, 0.26]]), torch.tensor([0.25, 0.25])).tolist() == [[False, True]]


def test_no_passing_class_gives_zero_everywhere() -> None:
    probs_NKhw = gated_probabilities(torch.randn(2, 3, 4, 4), torch.zeros(2, 3), torch.full((3,), 0.1))
    assert (probs_NKhw == 0).all()
