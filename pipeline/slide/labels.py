"""Turn probabilities into the stored bytes and labels of a map.

Shape suffixes: K classes, H and W the map.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.devices import to_host


class StoredMap(NamedTuple):
    """A map as it is stored. Outside the tissue everything is 0."""

    probs_KHW: NDArray[np.uint8]
    """The probabilities times 255."""
    labels_HW: NDArray[np.uint8]
    """0 for glass and for "no class"; class k of the model has the label k + 1."""
    has_class_HW: NDArray[np.bool_]
    """Whether the probability of some class is above 0."""


_STRIP_ROWS = 128
"""Rows of the map for which a CPU computes labels at a time. They stay in its cache for all steps. This takes half of
the time of whole maps, because each step on a whole map allocates fresh memory."""


def stored_map(probs_KHW: Tensor, tissue_HW: NDArray[np.bool_]) -> StoredMap:
    """Return what is stored of these probabilities, by a single copy to the host."""
    height = probs_KHW.shape[1]
    bytes_KHW = torch.empty_like(probs_KHW, dtype=torch.uint8)
    labels_HW, has_class_HW = torch.empty_like(bytes_KHW[0]), torch.empty_like(bytes_KHW[0], dtype=torch.bool)
    step = _STRIP_ROWS if probs_KHW.device.type == "cpu" else height
    for first in range(0, height, step):
        rows = slice(first, first + step)
        strip_KHW = probs_KHW[:, rows]
        one_HW = winners(strip_KHW) + 1
        labels_HW[rows] = one_HW * (one_HW <= len(probs_KHW))
        has_class_HW[rows] = strip_KHW.amax(dim=0) > 0
        # Add slightly more than one half: equal probabilities such as 0.5 lie on a rounding boundary, where the last
        # bit of the sums would decide.
        bytes_KHW[:, rows] = (strip_KHW * 255).add_(0.5 + 2**-10)
    found = to_host([bytes_KHW, labels_HW, has_class_HW])
    return StoredMap(*(array * tissue_HW for array in found))


def winners(probs_KHW: Tensor) -> Tensor:
    """Return the index of the most probable class of each pixel, (H, W) uint8; K if "no class" is more probable.

    Of equally probable classes, the first one wins. The probability of "no class" is one minus the sum of the class
    probabilities.
    """
    best_HW = probs_KHW.amax(dim=0)
    # Count the classes before the first of the best ones. `max(dim=0)` returns the same but takes twice as long.
    is_before_HW = torch.ones_like(best_HW, dtype=torch.uint8)
    winner_HW = torch.zeros_like(is_before_HW)
    for probs_HW in probs_KHW:
        is_before_HW *= probs_HW < best_HW
        winner_HW += is_before_HW
    is_class_HW = (best_HW > 0) & (best_HW >= 1 - probs_KHW.sum(dim=0))
    return torch.where(is_class_HW, winner_HW, len(probs_KHW))
