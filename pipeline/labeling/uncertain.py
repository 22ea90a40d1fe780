"""The patches whose answers are least certain, one of each group of similar patches.

Shape suffixes: L labeled patches, N patches, B the best of these, F features, K answers.
"""

from __future__ import annotations

import numpy as np
import scipy.special
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans, vq

BEST = 10
"""The most uncertain patches are clustered: this many for each patch that is requested."""


def entropy(logits_NK: NDArray[np.float64], answers_LK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how uncertain each patch is: the sum over the classes of the entropy of the answer, (N,).

    Classes are weighted by the inverse number of the rarer answer (1 present, 0 absent, NaN unknown) among the labels,
    so that rare classes count more.
    """
    probs_NK = scipy.special.expit(logits_NK)
    entropy_NK = scipy.special.entr(probs_NK) + scipy.special.entr(1 - probs_NK)
    rarer_K = np.minimum((answers_LK == 1).sum(axis=0), (answers_LK == 0).sum(axis=0))
    score_N: NDArray[np.float64] = entropy_NK @ (1 / (1 + rarer_K))
    return score_N


def best_of_clusters(
    features_NF: NDArray[np.float32], score_N: NDArray[np.float64], count: int, rng: np.random.Generator
) -> list[int]:
    """Return the best patch of each of at most `count` clusters of the best patches, the best first."""
    best_B = np.argsort(-score_N, kind="stable")[: BEST * count]
    cluster_B = clusters(features_NF[best_B], count, rng)
    first = sorted(int(np.flatnonzero(cluster_B == cluster)[0]) for cluster in np.unique(cluster_B))
    return [int(best_B[b]) for b in first]


def clusters(features_NF: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the cluster of each patch by k-means of standardized features; at most `count` clusters."""
    x_NF = (features_NF - features_NF.mean(axis=0, dtype=float)) / (features_NF.std(axis=0, dtype=float) + 1e-6)
    centers, _ = kmeans(x_NF, min(count, len(x_NF)), iter=3, rng=rng)
    cluster_N: NDArray[np.int64] = vq(x_NF, centers)[0].astype(np.int64)
    return cluster_N
