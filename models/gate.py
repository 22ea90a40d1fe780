"""The classification gate: a class that the classifier rejects gets no pixel.

Shape suffixes: N batch, K classes, h and w the map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def presence(logits_MK: Tensor) -> Tensor:
    """Return the probabilities of a classifier's logits, with bits that do not depend on the number of windows.

    On a CPU, torch computes the last few values of a sigmoid with other instructions, which can change the last bit. In
    float64, this bit is lost in the rounding. Apple's GPUs have no float64.
    """
    exact_MK = logits_MK if logits_MK.device.type == "mps" else logits_MK.double()
    return exact_MK.sigmoid().float()


def passing_classes(presence_NK: Tensor, thresholds_K: Tensor) -> Tensor:
    """Return which classes pass, (N, K) bool: those with a probability above the threshold of the class."""
    return presence_NK.float() > thresholds_K.float()


def gated_softmax(logits_Khw: Tensor, gate_Khw: Tensor) -> Tensor:
    """Return class probabilities (..., K, h, w) float32: the softmax, times the gates from 0 to 1, renormalized.

    ``p_k = g_k exp(o_k) / sum_j g_j exp(o_j)``. With gates of 0 and 1 only, this is ``o_k <- 0 if y_k <= epsilon_k`` on
    probabilities, renormalized (Han et al. 2022, section 3.3). If the gate of one class only is above 0, its
    probability is exactly 1 for any finite logits. If no gate is above 0, all probabilities are 0: "no class". Logits
    and gates may have sides of 1 instead of h and w.
    """
    probs_Khw = (logits_Khw.float() + gate_Khw.float().log()).softmax(dim=-3)
    # If every gate is 0 the softmax is NaN; rejected classes are 0 by definition.
    return torch.where(gate_Khw > 0, probs_Khw, 0.0)
