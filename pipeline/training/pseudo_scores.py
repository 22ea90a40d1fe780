"""Score pseudo masks against the pixel masks of the validation split, before a segmenter is trained.

The pseudo masks of validation images are made as those of training images are: from presence labels and the classifier.
The scores decide nothing. They tell a bad classifier from a bad segmenter.
"""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import torch

from models.cam import LAYERS
from models.classifier import Classifier
from pipeline.training.config import TrainConfig
from pipeline.training.evaluate import confusion_matrix, scores
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_masks import pseudo_masks_of_image

logger = logging.getLogger(__name__)


def write_pseudo_scores(
    file: Path, classifier: Classifier, validation: PatchImages, config: TrainConfig, device: torch.device
) -> None:
    """Write a CSV file with a row of `pseudo_scores` for each layer, and log the scores.

    Write nothing if the file exists, or if validation images have no masks.
    """
    if file.is_file() or any(sample.mask is None for sample in validation.samples):
        return
    rows = pseudo_scores(classifier, validation, config, device)
    for row in rows:
        logger.info("validation pseudo masks: %s", ", ".join(f"{name} {value}" for name, value in row.items()))
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(file)


def pseudo_scores(
    classifier: Classifier, validation: PatchImages, config: TrainConfig, device: torch.device
) -> list[dict[str, str | float]]:
    """Return mIoU, FwIoU, accuracy and IoUs of the pseudo masks of each layer of weight above 0, all images pooled.

    Pixels that the pseudo masks ignore do not count in the scores; their share of the pixels with a true class is
    "ignored".
    """
    names = validation.dataset.class_names
    matrices = []
    for index in range(len(validation)):
        truth_HW = validation.truth(index)
        masks_LHW = pseudo_masks_of_image(classifier, validation, index, config, device)
        matrices.append([confusion_matrix(truth_HW, mask_HW, len(names)) for mask_HW in masks_LHW])
    pooled_LXX = np.sum(matrices, axis=0)
    layers = [layer for layer, weight in zip(LAYERS, config.layer_weights, strict=True) if weight > 0]
    rows: list[dict[str, str | float]] = []
    for layer, matrix_XX in zip(layers, pooled_LXX, strict=True):
        ignored = matrix_XX[:-1, -1].sum() / max(1, matrix_XX[:-1].sum())
        taught_XX = matrix_XX.copy()
        taught_XX[:, -1] = 0  # the ignored pixels
        found = scores(taught_XX, names)
        values = {"miou": found.miou, "fwiou": found.fwiou, "accuracy": found.accuracy, "ignored": float(ignored)}
        values |= {f"iou_{name}": value for name, value in found.iou.items()}
        rows.append({"layer": layer} | {name: round(value, 4) for name, value in values.items()})
    return rows
