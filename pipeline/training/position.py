"""Measure whether a segmenter's map depends on the position of a pixel in its view.

Shape suffixes: N views, K classes, D distances, H and W the view, h and w the map at the output stride.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.segmenter import NATIVE_STRIDE
from pipeline.training.config import TrainConfig
from pipeline.training.inputs import as_input
from pipeline.training.patches import PatchImages, cut, draw_squares

logger = logging.getLogger(__name__)

RING = 16
"""Width in pixels of the rings around the edge of a view over which probabilities are averaged."""


def measures_position(config: TrainConfig) -> bool:
    """Return whether more than one ring of a view lies beyond the margin, as `position_metrics` needs."""
    return config.view > 2 * config.margin + 2 * RING


@torch.inference_mode()
def edge_profile(
    network: nn.Module, images: PatchImages, config: TrainConfig, device: torch.device
) -> NDArray[np.float64]:
    """Return the mean probability (K, D) of each class by distance from the edge of a view, in rings of `RING` pixels.

    It averages `config.position_views` random views of `config.view` pixels. Every pixel of an image is equally likely
    at every place of a view, so the profile of a network that ignores positions is flat.
    """
    logger.info(
        "measuring whether the map depends on the position in a view, with %d views of %d px (setting position_views); "
        "this can take minutes on a CPU",
        config.position_views,
        config.view,
    )
    rng = np.random.default_rng(config.seed)
    places = draw_squares(images, config.position_views, config.view, rng)
    total_Khw: NDArray[np.float64] | float = 0.0
    for start in range(0, len(places), config.segmenter_batch):
        batch = places[start : start + config.segmenter_batch]
        rgb_NHWC = np.stack([cut(images.rgb(place.image), place) for place in batch])
        probs_NKhw = network(as_input(rgb_NHWC, device, config)).float().softmax(dim=1)
        total_Khw = total_Khw + probs_NKhw.sum(dim=0, dtype=torch.float64).cpu().numpy()
    return ring_means(np.asarray(total_Khw) / len(places), RING // NATIVE_STRIDE)


def ring_means(map_Khw: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the means (K, D) of a map over the square rings of this width around its edge, the outermost first."""
    height_h, width_w = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in map_Khw.shape[1:])
    ring_hw = np.minimum(height_h[:, None], width_w) // width
    counts_D = np.bincount(ring_hw.ravel())
    means_KD: NDArray[np.float64] = np.stack(
        [np.bincount(ring_hw.ravel(), map_hw.ravel()) / counts_D for map_hw in map_Khw]
    )
    return means_KD


def position_metrics(profile_KD: NDArray[np.float64], margin: int) -> dict[str, float]:
    """Return the largest difference of a mean probability from the class's mean over the rings beyond the margin.

    A single ring beyond the margin has nothing to differ from, so the result is then empty.
    """
    trusted_KD = profile_KD[:, margin // RING :]
    if trusted_KD.shape[1] < 2:
        return {}
    deviation = np.abs(trusted_KD - trusted_KD.mean(axis=1, keepdims=True)).max()
    return {"val_position_deviation": round(float(deviation), 4)}
