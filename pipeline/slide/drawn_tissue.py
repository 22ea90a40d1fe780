"""Draw the tissue of a block by the block's own pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi.box import Box
from wsi.grid import Block, Grid
from wsi.resample import TilePixels, area_mean
from wsi.tissue import Tissue
from wsi.tissue_edge import fine_tissue, reach_px


def drawn_tissue(grid: Grid, tissue: Tissue, block: Block, pixels: TilePixels) -> NDArray[np.bool_]:
    """Return the tissue of a block as mask_HW, with its border drawn by the pixels of the block's canvases.

    The canvases contain the block's `block_tissue`, and have `edge_margin` or more pixels around it.
    """
    box_out = grid.box_out(pixels.canvas_m)
    rgb_HWC = area_mean(pixels.canvas_HWC, (0, 0), Box(0, 0, box_out.width, box_out.height), grid.m_per_out)
    fine_HW = fine_tissue(tissue, rgb_HWC, box_out, grid.l0_per_out, grid.mpp_out)
    inside = box_out.intersect(block.box_out).intersect(Box(0, 0, *grid.size_out))
    tissue_HW = np.zeros((block.box_out.height, block.box_out.width), bool)
    tissue_HW[inside.slices(block.box_out)] = fine_HW[inside.slices(box_out)]
    return tissue_HW


def edge_margin(grid: Grid) -> int:
    """Return how many model pixels around a place decide whether it is tissue, as a multiple of 16."""
    return -(-reach_px(grid.mpp_out) * grid.m_per_out // 16) * 16


def area_px(mask_HW: NDArray[np.bool_], box_out: Box, size_out: tuple[float, float]) -> float:
    """Return the area of a mask over a box of the map, in map pixels.

    `size_out` is the slide's (width, height) in map pixels. Of the map's last pixels, the part beyond it does not
    count. The area is rounded to a thousandth, so that it does not depend on the order of the sum.
    """
    share_W, share_H = (
        np.clip(length - np.arange(start, start + count), 0, 1)
        for length, start, count in zip(size_out, box_out[:2], box_out[2:], strict=True)
    )
    return round(float(((mask_HW * share_W).sum(axis=1) * share_H).sum()), 3)
