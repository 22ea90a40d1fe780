"""Features of well separated clusters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blobs(rng: np.random.Generator, sizes: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the features (N, F) of clusters of these sizes, one feature per cluster, and each patch's cluster (N,)."""
    cluster_N = np.repeat(np.arange(len(sizes)), sizes)
    features_NF = 10 * np.eye(len(sizes))[cluster_N] + rng.normal(size=(len(cluster_N), len(sizes)))
    return features_NF.astype(np.float32), cluster_N
