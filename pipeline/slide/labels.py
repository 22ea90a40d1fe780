"""Turn probabilities into the stored bytes and labels of a map.

Shape suffixes: K classes, H and W the map.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BACKGROUND_LABEL = 0
"""Label of glass and of "no class"; class k of the model has the label k + 1."""


def stored_map(probs_KHW: Tensor, tissue_HW: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the probabilities times 255 as probs_KHW, and labels_HW; both are 0 outside the tissue."""
    tissue = torch.from_numpy(tissue_HW).to(probs_KHW.device)
    winner_HW = winners(probs_KHW)
    labels_HW = torch.where(tissue & (winner_HW < len(probs_KHW)), winner_HW + 1, BACKGROUND_LABEL)
    # Slightly more than one half: equal probabilities such as 0.5 lie on a rounding edge, and the last bit of the
    # sums would decide.
    scaled_KHW = torch.where(tissue, probs_KHW * 255 + (0.5 + 2**-10), 0)
    return scaled_KHW.to(torch.uint8).cpu().numpy(), labels_HW.to(torch.uint8).cpu().numpy()


def winners(probs_KHW: Tensor) -> Tensor:
    """Return the index of the most probable class of each pixel, (H, W) int64; K if "no class" is more probable.

    The probability of "no class" is what the class probabilities lack to a sum of one.
    """
    best_HW, winner_HW = probs_KHW.max(dim=0)
    is_class_HW = (best_HW > 0) & (best_HW >= 1 - probs_KHW.sum(dim=0))
    return torch.where(is_class_HW, winner_HW, len(probs_KHW))
