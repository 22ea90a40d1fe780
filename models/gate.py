"""The classification gate: a class that the classifier rejects in a patch gets no pixel of that patch.

Shape suffixes: N batch, K classes, h and w the map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def passing_classes(presence_NK: Tensor, thresholds_K: Tensor) -> Tensor:
    """Return which classes pass, (N, K) bool: those with a probability above the threshold of the class."""
    return presence_NK.float() > thresholds_K.float()


def masked_softmax(logits_NKhw: Tensor, passed_NK: Tensor) -> Tensor:
    """Return class probabilities (N, K, h, w) float32: rejected classes are 0, and the others sum to 1.

    ``o_k <- 0 if y_k <= epsilon_k`` on probabilities, renormalized (Han et al. 2022, section 3.3). It is computed as a
    softmax in which rejected classes have the logit -inf. If one class passes, its probability is exactly 1 everywhere,
    whatever its logits are. If no class passes, all probabilities are 0: "no class".
    """
    passed_NK11 = passed_NK[:, :, None, None]
    probs_NKhw = logits_NKhw.float().masked_fill(~passed_NK11, -torch.inf).softmax(dim=1)
    # If every logit is -inf the softmax is NaN; rejected classes are 0 by definition.
    return torch.where(passed_NK11, probs_NKhw, torch.zeros_like(probs_NKhw))
