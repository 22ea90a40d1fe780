"""Calibration of the gate: the side of its windows and the threshold of each class, both from labeled patches.

Shape suffixes: N views, M labeled patches, K classes, H and W a view, C channels.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray

from models.classifier import Classifier
from models.gate import presence
from pipeline.training.classifier import held_out_batches, patch_outputs
from pipeline.training.config import TrainConfig
from pipeline.training.inputs import as_input
from pipeline.training.patches import PatchImages

logger = logging.getLogger(__name__)

UNCALIBRATED = 0.1
"""Gate threshold of a class without a validation patch (epsilon of Han et al. 2022)."""


def gate_window(images: PatchImages) -> int:
    """Return the side of the gate's windows: the side of the labeled patches, rounded to a multiple of 16."""
    return max(16, round(int(images.boxes[0][0, 2]) / 16) * 16)


def patch_presence(
    classifier: Classifier, images: PatchImages, config: TrainConfig, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the presence probabilities (M, K) of all labeled patches, and the classes that they contain (M, K)."""
    found, held = [], []
    with torch.inference_mode():
        for rgb_NHWC, boxes, present_MK in held_out_batches(images, whole=config.region is not None):
            logits_MK = patch_outputs(classifier, as_input(rgb_NHWC, device, config), boxes).logits_NK
            found.append(presence(logits_MK).cpu().numpy())
            held.append(present_MK)
    return np.concatenate(found), np.concatenate(held)


def warn_of_uncalibrated(validation: PatchImages) -> None:
    """Log a warning that names the classes that no labeled patch of the validation images contains."""
    present_BK = np.concatenate(validation.present)
    missing = [name for k, name in enumerate(validation.dataset.class_names) if not present_BK[:, k].any()]
    if missing:
        logger.warning(
            "%s: no validation patch has class %s; without such patches, the gate threshold of a class is %s, and "
            "scores do not measure the class; add validation images of it",
            validation.dataset.card.name,
            ", ".join(missing),
            UNCALIBRATED,
        )


def calibrate_gate(presence_MK: NDArray[np.float32], held_MK: NDArray[np.bool_], recall: float) -> tuple[float, ...]:
    """Return per class the largest threshold, to 0.0002, that accepts `recall` of the patches with the class.

    No threshold accepts a presence of exactly 0, to which logits below -104 are rounded. If too many patches have it,
    the threshold is 0 and accepts fewer. The threshold of a class that no patch contains is `UNCALIBRATED`.
    """
    thresholds = []
    for k in range(held_MK.shape[1]):
        held = presence_MK[held_MK[:, k], k]
        # The number of patches to accept. 1e-9, because 0.9 * 10 can round to slightly more than 9.
        passing = max(1, math.ceil(recall * len(held) - 1e-9))
        value = float(np.sort(held)[len(held) - passing]) - 1e-4 if len(held) else UNCALIBRATED
        thresholds.append(round(max(0.0, value), 4))
    return tuple(thresholds)
