"""TypiClust: patches that are typical of clusters without a label, for the simulation of labeling (label_order.py).

Shape suffixes: N patches, M members of a cluster, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from pipeline.labeling.uncertain import clusters

NEIGHBORS = 20
"""Neighbors over which typicality is averaged, as in the paper."""


def typical(
    features_NF: NDArray[np.float32], labeled: Sequence[int], count: int, rng: np.random.Generator
) -> list[int]:
    """Return patches that are typical of clusters without a label, those of the largest clusters first.

    There are as many clusters as labels and asked patches together. Typicality is the inverse mean distance to the
    nearest `NEIGHBORS` of the cluster. Source: TypiClust, Hacohen et al., ICML 2022, section 3.
    """
    cluster_N = clusters(features_NF, len(labeled) + count, rng)
    sizes = np.bincount(cluster_N)
    sizes[cluster_N[list(labeled)]] = 0
    chosen = [cluster for cluster in np.argsort(-sizes, kind="stable")[:count] if sizes[cluster]]
    return [_most_typical(features_NF, np.flatnonzero(cluster_N == cluster)) for cluster in chosen]


def _most_typical(features_NF: NDArray[np.float32], members: NDArray[np.int64]) -> int:
    distance_MM = np.sort(cdist(features_NF[members], features_NF[members]), axis=1)
    # The nearest is the member itself.
    return int(members[distance_MM[:, 1 : NEIGHBORS + 1].sum(axis=1).argmin()])
