"""The classification gate: a class that the classifier rejects in a patch gets no pixel of that patch.

Shape suffixes: N batch, K classes, h and w the map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def passing_classes(presence_NK: Tensor, thresholds_K: Tensor) -> Tensor:
    """Return which classes pass, (N, K) bool: those with a probability above the threshold of the class."""
    return presence_NK.float() > thresholds_K.float()


def masked_softmax(logits_Khw: Tensor, allowed_Khw: Tensor) -> Tensor:
    """Return class probabilities (..., K, h, w) float32: rejected classes are 0, and the others sum to 1.

    `allowed_Khw` may have sides of 1 instead of h and w. ``o_k <- 0 if y_k <= epsilon_k`` on probabilities,
    renormalized (Han et al. 2022, section 3.3). It is computed as a softmax in which rejected classes have the logit
    -inf. If one class passes, its probability is exactly 1, whatever its logits are. If no class passes, all
    probabilities are 0: "no class".
    """
    probs_Khw = logits_Khw.float().masked_fill(~allowed_Khw, -torch.inf).softmax(dim=-3)
    # If every logit is -inf the softmax is NaN; rejected classes are 0 by definition.
    return torch.where(allowed_Khw, probs_Khw, torch.zeros_like(probs_Khw))
