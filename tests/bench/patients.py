"""Confidence intervals and paired tests over patients, from the confusion matrices of images.

Images of one patient are not independent, so all resampling is over patients. Seeds of a recipe are averaged: the score
of a recipe is the mean over its seeds of the mIoU of all pixels.

Shape suffixes: S seeds, P patients, X classes and "no class", D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.training.evaluate import Evaluation

DRAWS = 10_000
"""Bootstrap draws, and permutations if there are more than `EXACT` patients."""

EXACT = 12
"""Most patients for which every permutation is computed."""


@dataclass(frozen=True)
class Comparison:
    """The difference of two recipes on the same patients."""

    difference: float
    """Mean mIoU of the first minus that of the second."""
    low: float
    high: float
    """95 % bootstrap interval of the difference over patients."""
    p: float
    """Two-sided p of the paired permutation test over patients."""


def image_counts(evaluation: Evaluation) -> dict[str, dict[str, object]]:
    """Return {image: {"case": patient, "counts": confusion matrix as lists}}, with the gate, for a JSON file."""
    return {
        image: {"case": evaluation.groups[image], "counts": counts.tolist()}
        for image, counts in evaluation.image_matrices.items()
    }


def patient_counts(images: Mapping[str, Mapping[str, object]]) -> dict[str, NDArray[np.int64]]:
    """Return the confusion matrix (X, X) of each patient, from `image_counts`."""
    found: dict[str, NDArray[np.int64]] = {}
    for image in images.values():
        counts_XX, patient = np.asarray(image["counts"], np.int64), str(image["case"])
        found[patient] = found[patient] + counts_XX if patient in found else counts_XX
    return dict(sorted(found.items()))


def miou(counts_XX: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mIoU of confusion matrices (..., X, X), as `pipeline.training.evaluate.scores` with `exclude` does."""
    counted_KX = counts_XX[..., :-1, :].astype(float)
    hit_K = np.diagonal(counted_KX, axis1=-2, axis2=-1)
    union_K = counted_KX.sum(axis=-1) + counted_KX.sum(axis=-2)[..., :-1] - hit_K
    iou_K = np.divide(hit_K, union_K, out=np.full_like(union_K, np.nan), where=union_K > 0)
    mean: NDArray[np.float64] = np.nanmean(iou_K, axis=-1)
    return mean


def score(counts_SPXX: NDArray[np.int64]) -> float:
    """Return the mean over seeds of the mIoU of all patients' pixels."""
    return float(miou(counts_SPXX.sum(axis=1)).mean())


def interval(counts_SPXX: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of `score` over draws of as many patients with replacement (Efron 1979)."""
    low, high = np.percentile(_drawn_scores(counts_SPXX), (2.5, 97.5))
    return float(low), float(high)


def compare(first_SPXX: NDArray[np.int64], second_SPXX: NDArray[np.int64]) -> Comparison:
    """Compare two recipes on the same patients, with as many seeds each.

    The test is exact for up to `EXACT` patients: under the null hypothesis, the predictions of the two recipes for a
    patient could be exchanged, so the difference is recomputed with every subset of patients exchanged (Fisher 1935).
    Raises ValueError if the shapes differ.
    """
    if first_SPXX.shape != second_SPXX.shape:
        raise ValueError(f"{first_SPXX.shape} and {second_SPXX.shape}: compare the same seeds, patients and classes")
    difference = score(first_SPXX) - score(second_SPXX)
    drawn_D = _drawn_scores(first_SPXX) - _drawn_scores(second_SPXX)
    low, high = np.percentile(drawn_D, (2.5, 97.5))
    moved_DSXX = np.einsum("dp,spxy->dsxy", _exchanges(first_SPXX.shape[1]), second_SPXX - first_SPXX)
    exchanged_D = miou(first_SPXX.sum(axis=1) + moved_DSXX).mean(axis=1)
    exchanged_D -= miou(second_SPXX.sum(axis=1) - moved_DSXX).mean(axis=1)
    # 1e-12, because the sum of the same numbers in another order can differ in the last bit.
    p = float((np.abs(exchanged_D) >= abs(difference) - 1e-12).mean())
    return Comparison(difference, float(low), float(high), p)


def _drawn_scores(counts_SPXX: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `score` for `DRAWS` draws of patients. Every call draws the same patients, so that calls can be paired."""
    rng = np.random.default_rng(0)
    patients = counts_SPXX.shape[1]
    times_DP = rng.multinomial(patients, np.full(patients, 1 / patients), size=DRAWS)
    drawn_DSXX = np.einsum("dp,spxy->dsxy", times_DP, counts_SPXX)
    scores_D: NDArray[np.float64] = miou(drawn_DSXX).mean(axis=1)
    return scores_D


def _exchanges(patients: int) -> NDArray[np.int64]:
    """Return every subset of the patients (D, P) as 0 and 1, or the empty one and random others if there are many."""
    if patients <= EXACT:
        return (np.arange(2**patients)[:, None] >> np.arange(patients)) % 2
    drawn_DP = np.random.default_rng(1).integers(2, size=(DRAWS, patients))
    drawn_DP[0] = 0
    return drawn_DP
