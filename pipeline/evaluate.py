"""Measures a predictor against pixel masks: one confusion matrix, pooled over all patches, and the scores from it.

Shape suffixes: N patches, K classes, H and W the image.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from models.predictor import Predictor
from pipeline.patches import CLASS_NAMES, Patches


def confusion_matrix(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Count pixels in a (K+1, K+1) matrix, rows truth, columns prediction; the last index of each collects what is no
    class.
    """
    rows = np.minimum(truth.astype(np.int64), classes).ravel()
    columns = np.minimum(predicted.astype(np.int64), classes).ravel()
    return np.bincount(rows * (classes + 1) + columns, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def scores(matrix: NDArray[np.int64], names: tuple[str, ...] = CLASS_NAMES) -> dict[str, float]:
    """Return per-class IoU, mean IoU (nanmean), frequency-weighted IoU and pixel accuracy of a pooled
    `confusion_matrix`.

    Pixels whose truth is no class are dropped (protocol `exclude`); a prediction of no class counts as
    wrong.
    """
    counted = matrix[:-1].astype(float)
    hit, truth, predicted = np.diag(counted), counted.sum(axis=1), counted.sum(axis=0)[:-1]
    union = truth + predicted - hit
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    total = max(counted.sum(), 1.0)
    result = {f"iou_{name}": float(value) for name, value in zip(names, iou, strict=True)}
    result["miou"] = float(np.nanmean(iou))
    result["fwiou"] = float(np.nansum(truth / total * np.nan_to_num(iou)))
    result["accuracy"] = float(hit.sum() / total)
    return result


def evaluate(predictor: Predictor, patches: Patches) -> dict[str, float]:
    """Return `scores` over whole patches, pooled over all pixels, and the share of tiles that the gate leaves with one
    class.
    """
    classes = len(predictor.card.classes)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    single = 0
    for start in range(0, len(patches), predictor.batch_size):
        picked = slice(start, start + predictor.batch_size)
        prediction = predictor.predict(patches.rgb_NHWC[picked])
        labels_NHW = prediction.probs_NKhw.argmax(dim=1).to(torch.uint8).cpu().numpy()
        labels_NHW[~prediction.passed_NK.any(axis=1)] = classes
        matrix += confusion_matrix(patches.masks_NHW[picked], labels_NHW, classes)
        single += int((prediction.passed_NK.sum(axis=1) == 1).sum())
    return scores(matrix, tuple(entry.name for entry in predictor.card.classes)) | {
        "single_class_tiles": single / len(patches)
    }
