"""The classification gate: classes that the classifier does not see in a patch get no pixel of it.

Shape suffixes: N batch, K classes, h and w the map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def passing_classes(presence_NK: Tensor, thresholds_K: Tensor) -> Tensor:
    """Tell which classes pass, (N, K) bool: the classifier's probability is above the class's threshold."""
    return presence_NK.float() > thresholds_K.float()


def masked_softmax(logits_NKhw: Tensor, passed_NK: Tensor) -> Tensor:
    """Return class probabilities (N, K, h, w) float32: 0 for classes that do not pass, and the others sum to 1.

    ``o_k <- 0 where y_k <= epsilon_k`` on probabilities, renormalised (Han et al. 2022, section 3.3),
    computed as a softmax in which gated classes have the logit -inf. So one passing class gives exactly 1 everywhere,
    whatever its logits, and no passing class gives 0 everywhere: "no class".
    """
    passed_NK11 = passed_NK[:, :, None, None]
    probs_NKhw = logits_NKhw.float().masked_fill(~passed_NK11, -torch.inf).softmax(dim=1)
    # softmax over nothing but -inf is NaN; every gated class, those rows included, is 0 by definition.
    return torch.where(passed_NK11, probs_NKhw, torch.zeros_like(probs_NKhw))
