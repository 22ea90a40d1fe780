"""A light model of presence: one logistic regression per answer, on the features of labeled patches.

It is trained in milliseconds, and only to choose which patches to label next. `wsi-train` trains the real model.

Shape suffixes: L labeled patches, N patches, F features, K answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import NDArray

PENALTY = 0.1
"""Factor on the squared weights, for features with a standard deviation of 1."""


@dataclass(frozen=True)
class PresenceHead:
    """The weights of the regressions."""

    mean_F: NDArray[np.float64]
    scale_F: NDArray[np.float64]
    weight_FK: NDArray[np.float64]
    bias_K: NDArray[np.float64]

    def logits(self, features_NF: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the logit of each answer being "present", (N, K)."""
        found_NK: NDArray[np.float64] = (features_NF - self.mean_F) / self.scale_F @ self.weight_FK + self.bias_K
        return found_NK


def fit_head(features_LF: NDArray[np.float32], answers_LK: NDArray[np.float64]) -> PresenceHead:
    """Return the head that minimizes the mean logistic loss plus `PENALTY` times the squared weights.

    Answers are 1 for present, 0 for absent and NaN for unknown. An answer that is never known gets the logit 0.
    """
    mean_F, scale_F = features_LF.mean(axis=0, dtype=float), features_LF.std(axis=0, dtype=float) + 1e-6
    x_LF = (features_LF - mean_F) / scale_F
    known_LK = ~np.isnan(answers_LK)
    columns = zip(answers_LK.T, known_LK.T, strict=True)
    fitted = np.array([_regression(x_LF[known_L], answer_L[known_L] == 1) for answer_L, known_L in columns])
    return PresenceHead(mean_F, scale_F, fitted[:, :-1].T, fitted[:, -1])


def _regression(x_LF: NDArray[np.float64], present_L: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the weights and, last, the bias, (F + 1). The bias is not penalized."""
    start = np.zeros(x_LF.shape[1] + 1)
    if not len(present_L):
        return start
    sign_L = np.where(present_L, 1.0, -1.0)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin_L = sign_L * (x_LF @ weights[:-1] + weights[-1])
        slope_L = -sign_L * scipy.special.expit(-margin_L) / len(sign_L)
        value = np.logaddexp(0, -margin_L).mean() + PENALTY * np.square(weights[:-1]).sum()
        return float(value), np.append(slope_L @ x_LF + 2 * PENALTY * weights[:-1], slope_L.sum())

    # If all answers are the same, the loss does not have a minimum; the solver stops when it hardly falls.
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    weights: NDArray[np.float64] = found.x
    return weights
