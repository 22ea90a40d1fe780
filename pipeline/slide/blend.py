"""Overlapping tiles blended into one map, and the label of each of its pixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from wsi.box import Box
from wsi.grid import Block

BACKGROUND_LABEL = 0
"""Label of glass and of "no class"; class k of the model has the label k + 1."""


class Blend:
    """The weighted mean of overlapping tiles over one block, on the network's device.

    Every tile counts with a weight that falls towards its edges, and the sum is divided by the summed weights: weights
    sum to one everywhere, so equal tiles give an equal map, and there are no seams.
    """

    def __init__(self, block: Block, classes: int, tile_out: int, device: torch.device) -> None:
        side = (block.box_out.height, block.box_out.width)
        self._box_out = block.box_out
        self._sums_KHW = torch.zeros((classes, *side), device=device)
        self._weights_HW = torch.zeros(side, device=device)
        # Raised cosine; positive at the outermost pixel, so that no pixel of a tile is without weight.
        ramp = torch.sin(torch.pi * (torch.arange(tile_out, dtype=torch.float64) + 0.5) / tile_out) ** 2
        self._window_hw = torch.outer(ramp, ramp).to(device, torch.float32)

    def add(self, box_out: Box, probs_Khw: torch.Tensor) -> None:
        """Add one tile, whose corner is `box_out`'s; parts outside the block are dropped."""
        inside = box_out.intersect(self._box_out)
        rows, columns = inside.slices(self._box_out)
        tile_rows, tile_columns = inside.slices(box_out)
        window_hw = self._window_hw[tile_rows, tile_columns]
        self._sums_KHW[:, rows, columns] += probs_Khw[:, tile_rows, tile_columns] * window_hw
        self._weights_HW[rows, columns] += window_hw

    def mean(self) -> torch.Tensor:
        """Probabilities as probs_KHW float32; 0 where there was no tile."""
        return self._sums_KHW / self._weights_HW.clamp_min(torch.finfo(torch.float32).tiny)

    def result(self, tissue_HW: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Probabilities (times 255) as probs_KHW and labels_HW; both are 0 outside the tissue."""
        tissue = torch.from_numpy(tissue_HW).to(self._weights_HW.device)
        probs_KHW = self.mean()
        winner_HW = winners(probs_KHW)
        labels_HW = torch.where(tissue & (winner_HW < len(probs_KHW)), winner_HW + 1, BACKGROUND_LABEL)
        # A little above one half: equal probabilities such as 0.5 lie on a rounding edge, where the last bit of the
        # sums would decide.
        scaled_KHW = torch.where(tissue, probs_KHW * 255 + (0.5 + 2**-10), 0)
        return scaled_KHW.to(torch.uint8).cpu().numpy(), labels_HW.to(torch.uint8).cpu().numpy()


def winners(probs_KHW: torch.Tensor) -> torch.Tensor:
    """Index of the most probable class of each pixel, (H, W) int64; K where "no class" is more probable.

    The probability of "no class" is what is missing to a sum of one.
    """
    best_HW, winner_HW = probs_KHW.max(dim=0)
    is_class_HW = (best_HW > 0) & (best_HW >= 1 - probs_KHW.sum(dim=0))
    return torch.where(is_class_HW, winner_HW, len(probs_KHW))
