"""Predict overlapping tiles, blend them into one map, and label its pixels.

Shape suffixes: N tiles, K classes, H and W the map or the canvas, h and w one tile of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi.box import Box

BACKGROUND_LABEL = 0
"""Label of glass and of "no class"; class k of the model has the label k + 1."""

TILE_GROUP = 128
"""Tiles that are passed to the networks at a time; the predictor splits them into batches."""

PredictTiles = Callable[[Tensor, Sequence[Box]], Sequence[Tensor]]
"""RGB tiles (N, H, W, 3) and their boxes in model pixels -> one tensor of maps (N, K, h, w) for each blend."""


class Blend:
    """The weighted mean of overlapping tiles over a box of the map, on the network's device.

    The weight of a tile's pixel falls towards the tile's edges. The weighted sum is divided by the summed weights, so
    weights sum to one everywhere: equal tiles give an equal map, and there are no seams.
    """

    def __init__(self, box_out: Box, classes: int, tile_out: int, device: torch.device) -> None:
        side = (box_out.height, box_out.width)
        self._box_out = box_out
        self._sums_KHW = torch.zeros((classes, *side), device=device)
        self._weights_HW = torch.zeros(side, device=device)
        # Raised cosine, sampled at pixel centers: the outermost pixels of a tile have a positive weight, too.
        ramp = torch.sin(torch.pi * (torch.arange(tile_out, dtype=torch.float64) + 0.5) / tile_out) ** 2
        self._window_hw = torch.outer(ramp, ramp).to(device, torch.float32)

    def add(self, tile_out: Box, probs_Khw: Tensor) -> None:
        """Add the probabilities of one tile, whose corner is that of `tile_out`; parts outside the box are dropped."""
        inside = tile_out.intersect(self._box_out)
        rows, columns = inside.slices(self._box_out)
        tile_rows, tile_columns = inside.slices(tile_out)
        window_hw = self._window_hw[tile_rows, tile_columns]
        self._sums_KHW[:, rows, columns] += probs_Khw[:, tile_rows, tile_columns] * window_hw
        self._weights_HW[rows, columns] += window_hw

    def mean(self) -> Tensor:
        """Return the probabilities as probs_KHW float32; pixels without a tile are 0."""
        return self._sums_KHW / self._weights_HW.clamp_min(torch.finfo(torch.float32).tiny)

    def result(self, tissue_HW: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the probabilities times 255 as probs_KHW, and labels_HW; both are 0 outside the tissue."""
        tissue = torch.from_numpy(tissue_HW).to(self._weights_HW.device)
        probs_KHW = self.mean()
        winner_HW = winners(probs_KHW)
        labels_HW = torch.where(tissue & (winner_HW < len(probs_KHW)), winner_HW + 1, BACKGROUND_LABEL)
        # Slightly more than one half: equal probabilities such as 0.5 lie on a rounding edge, and the last bit of the
        # sums would decide.
        scaled_KHW = torch.where(tissue, probs_KHW * 255 + (0.5 + 2**-10), 0)
        return scaled_KHW.to(torch.uint8).cpu().numpy(), labels_HW.to(torch.uint8).cpu().numpy()


def blend_tiles(
    blends: Sequence[Blend], canvas_HWC: Tensor, canvas_m: Box, tiles_m: Sequence[Box], predict: PredictTiles
) -> None:
    """Predict all tiles, `TILE_GROUP` at a time, and add their maps to the blends.

    `canvas_HWC` holds the RGB pixels of `canvas_m`, in which all tiles lie. `predict` returns one tensor for each
    blend. Corners of tiles are multiples of the output stride, which follows from the size of the maps.
    """
    for start in range(0, len(tiles_m), TILE_GROUP):
        group_m = tiles_m[start : start + TILE_GROUP]
        maps = predict(torch.stack([canvas_HWC[tile_m.slices(canvas_m)] for tile_m in group_m]), group_m)
        for blend, probs_NKhw in zip(blends, maps, strict=True):
            for tile_m, probs_Khw in zip(group_m, probs_NKhw, strict=True):
                blend.add(tile_m.reduce(tile_m.width // probs_Khw.shape[2]), probs_Khw)


def winners(probs_KHW: Tensor) -> Tensor:
    """Return the index of the most probable class of each pixel, (H, W) int64; K if "no class" is more probable.

    The probability of "no class" is what the class probabilities lack to a sum of one.
    """
    best_HW, winner_HW = probs_KHW.max(dim=0)
    is_class_HW = (best_HW > 0) & (best_HW >= 1 - probs_KHW.sum(dim=0))
    return torch.where(is_class_HW, winner_HW, len(probs_KHW))
