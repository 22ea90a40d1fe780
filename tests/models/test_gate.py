from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.gate import gated_softmax, passing_classes


def gated_probabilities(logits_NKhw: Tensor, presence_NK: Tensor, thresholds_K: Tensor) -> Tensor:
    return gated_softmax(logits_NKhw, passing_classes(presence_NK, thresholds_K)[:, :, None, None])


class Drawn(NamedTuple):
    """The numbers that define a case. A failure shows these instead of tensors."""

    images: int
    classes: int
    scale: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, K, h, w), presence (N, K) and thresholds (K)."""
        generator = torch.Generator().manual_seed(self.seed)
        logits_NKhw = torch.randn(self.images, self.classes, 3, 5, generator=generator) * self.scale
        presence_NK = torch.rand(self.images, self.classes, generator=generator)
        return logits_NKhw, presence_NK, torch.rand(self.classes, generator=generator)


cases = st.builds(
    Drawn, st.integers(1, 4), st.integers(2, 5), st.sampled_from([0.1, 1.0, 30.0, 1e4]), st.integers(0, 2**31)
)


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality up to 1e-5; the failure shows the differing place and all values of its row."""
    off = (~((actual - expected).abs() <= 1e-5)).nonzero()
    if len(off):
        n, _, y, x = (int(i) for i in off[0])
        raise AssertionError(f"{len(off)} off, first {(n, y, x)}: {actual[n, :, y, x]} is not {expected[n, :, y, x]}")


@given(cases)
def test_rejected_classes_are_zero_and_the_others_sum_to_one(case: Drawn) -> None:
    logits_NKhw, presence_NK, thresholds_K = case.tensors()
    probs_NKhw = gated_probabilities(logits_NKhw, presence_NK, thresholds_K)
    passed_NK = presence_NK > thresholds_K
    assert (probs_NKhw[~passed_NK] == 0).all()
    total_N1hw = probs_NKhw.sum(dim=1, keepdim=True)
    check_close(total_N1hw, passed_NK.any(dim=1).float()[:, None, None, None].expand_as(total_N1hw))
    assert probs_NKhw.dtype == torch.float32


@given(cases)
def test_the_gate_renormalizes_the_probabilities(case: Drawn) -> None:
    logits_NKhw, presence_NK, thresholds_K = case.tensors()
    logits_NKhw = logits_NKhw.clamp(-20, 20)
    kept_NKhw = logits_NKhw.double().softmax(dim=1) * (presence_NK > thresholds_K)[:, :, None, None]
    total_N1hw = kept_NKhw.sum(dim=1, keepdim=True)
    expected_NKhw = torch.where(total_N1hw > 0, kept_NKhw / total_N1hw.clamp_min(1e-300), 0.0)
    check_close(gated_probabilities(logits_NKhw, presence_NK, thresholds_K), expected_NKhw)


@given(cases)
def test_a_gate_between_0_and_1_weighs_the_probabilities(case: Drawn) -> None:
    logits_NKhw, gate_NK, _ = case.tensors()
    logits_NKhw = logits_NKhw.clamp(-20, 20)
    kept_NKhw = logits_NKhw.double().softmax(dim=1) * gate_NK.double()[:, :, None, None]
    check_close(gated_softmax(logits_NKhw, gate_NK[:, :, None, None]), kept_NKhw / kept_NKhw.sum(dim=1, keepdim=True))


@given(cases, st.integers(0, 1))
def test_the_only_passing_class_is_exactly_one_for_any_logits(case: Drawn, only: int) -> None:
    logits_NKhw, presence_NK, thresholds_K = case.tensors()
    presence_NK = torch.zeros_like(presence_NK)
    presence_NK[:, only] = 1.0
    probs_NKhw = gated_probabilities(logits_NKhw, presence_NK, thresholds_K.clamp(0.1, 0.9))
    assert (probs_NKhw[:, only] == 1.0).all()
    assert probs_NKhw.sum() == logits_NKhw[:, 0].numel()


def test_a_rejected_class_does_not_win_over_negative_logits() -> None:
    """The published code multiplies logits by 0, so a rejected class beats every class with negative logits."""
    logits_NKhw = torch.tensor([-1.0, -5.0, -9.0]).view(1, 3, 1, 1)
    probs_NKhw = gated_probabilities(logits_NKhw, torch.tensor([[0.0, 0.9, 0.9]]), torch.full((3,), 0.1))
    assert probs_NKhw.argmax(dim=1).item() == 1


def test_a_probability_equal_to_the_threshold_is_rejected() -> None:
    assert passing_classes(torch.tensor([[0.25, 0.26]]), torch.tensor([0.25, 0.25])).tolist() == [[False, True]]


def test_probabilities_are_zero_everywhere_if_no_class_passes() -> None:
    probs_NKhw = gated_probabilities(torch.randn(2, 3, 4, 4), torch.zeros(2, 3), torch.full((3,), 0.1))
    assert (probs_NKhw == 0).all()
