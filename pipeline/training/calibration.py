"""Temperature of the segmenter, and how well its probabilities match the share of correct pixels.

Shape suffixes: N pixels, K classes, B bins, H and W an image, h and w the map at the output stride.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.predictor import Predictor
from models.segmenter import NATIVE_STRIDE
from pipeline.training.dataset import IGNORED
from pipeline.training.inputs import surrounded
from pipeline.training.patches import PatchImages

logger = logging.getLogger(__name__)

BINS = 15
"""Bins of equal width of the confidence, as in Guo et al. 2017."""

PIXELS_PER_IMAGE = 2000
"""Map pixels drawn from each validation image, so that one large image does not decide alone."""

LOWEST, HIGHEST = 0.05, 20.0
"""Range of temperatures."""


@dataclass(frozen=True)
class Reliability:
    """How often a prediction is correct, by its confidence: the probability of the most probable class."""

    count_B: NDArray[np.int64]
    """Pixels in each bin."""
    confidence_B: NDArray[np.float64]
    """Mean confidence in each bin; 0 in an empty bin."""
    accuracy_B: NDArray[np.float64]
    """Share of correct pixels in each bin; 0 in an empty bin."""

    @property
    def error(self) -> float:
        """Return the expected calibration error: the mean of |accuracy - confidence| over all pixels."""
        gap_B = np.abs(self.accuracy_B - self.confidence_B)
        return float((self.count_B * gap_B).sum() / max(1, self.count_B.sum()))


@dataclass(frozen=True)
class Calibration:
    """The temperature of a segmenter, and its reliability on validation pixels before and after."""

    temperature: float
    before: Reliability | None
    """With temperature 1; None if no validation pixel has a class in a mask."""
    after: Reliability | None

    def metrics(self) -> dict[str, float]:
        """Return the calibration errors for a model card; nothing if the temperature was not fitted."""
        if self.before is None or self.after is None:
            return {}
        return {"val_ece_uncalibrated": round(self.before.error, 4), "val_ece": round(self.after.error, 4)}


def write_reliability(file: Path, calibration: Calibration) -> None:
    """Draw the accuracy of each bin against its confidence, before and after calibration, if it was fitted."""
    if calibration.before is None or calibration.after is None:
        return
    # Not pyplot, which opens a backend and keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="0.7", label="calibrated")
    for found, name in ((calibration.before, "temperature 1"), (calibration.after, f"{calibration.temperature:.2f}")):
        used_B = found.count_B > 0
        label = f"{name}: error {found.error:.3f}"
        axes.plot(found.confidence_B[used_B], found.accuracy_B[used_B], marker=".", label=label)
    axes.set(xlabel="confidence", ylabel="share of correct pixels", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    temporary = file.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(file)


def calibrate_temperature(predictor: Predictor, validation: PatchImages) -> Calibration:
    """Return the temperature that fits a segmenter's probabilities to the masks of the validation images.

    The masks decide this one number and nothing else. Without masks, or if no pixel has a class in them, the
    temperature is 1. Log a warning if it is 1 for that reason, or at a bound of its range. `predictor` must have the
    temperature 1.
    """
    if any(sample.mask is None for sample in validation.samples):
        logger.warning("the temperature stays 1 because the validation images have no masks")
        return Calibration(1.0, None, None)
    logits_NK, truth_N = labeled_logits(predictor, validation)
    if not len(truth_N):
        logger.warning("the temperature stays 1 because no pixel of the validation masks has a class")
        return Calibration(1.0, None, None)
    temperature = fitted_temperature(logits_NK, truth_N)
    if not LOWEST * 1.001 < temperature < HIGHEST / 1.001:
        logger.warning(
            "the fitted temperature is %s, a bound of its range (%s to %s), so the probabilities are not calibrated; "
            "the validation masks may contain too few classes, or the segmenter may be barely trained",
            temperature,
            LOWEST,
            HIGHEST,
        )
    before, after = (reliability((logits_NK / t).softmax(dim=1), truth_N) for t in (1.0, temperature))
    return Calibration(temperature, before, after)


def labeled_logits(predictor: Predictor, images: PatchImages) -> tuple[Tensor, Tensor]:
    """Return the segmenter's logits (N, K) and the true classes (N,) of map pixels drawn from every image."""
    rng = np.random.default_rng(0)
    logits, truths = [], []
    for index in range(len(images)):
        rgb_HWC = images.rgb(index)
        # The truth at the center of each map pixel, in the part of the map that covers the image.
        truth_hw = images.truth(index)[NATIVE_STRIDE // 2 :: NATIVE_STRIDE, NATIVE_STRIDE // 2 :: NATIVE_STRIDE]
        with predictor.lock:
            logits_Khw = predictor.logits(surrounded(rgb_HWC[None], predictor.card.margin))[0].cpu()
        logits_Khw = logits_Khw[:, : truth_hw.shape[0], : truth_hw.shape[1]]
        known = np.flatnonzero(truth_hw.ravel() != IGNORED)
        drawn = torch.from_numpy(rng.permutation(known)[:PIXELS_PER_IMAGE])
        logits.append(logits_Khw.flatten(1)[:, drawn].T)
        truths.append(torch.from_numpy(truth_hw.ravel().astype(np.int64))[drawn])
    return torch.cat(logits), torch.cat(truths)


def fitted_temperature(logits_NK: Tensor, truth_N: Tensor) -> float:
    """Return the temperature of the lowest negative log-likelihood of the truth (Guo et al., ICML 2017).

    The likelihood has one minimum, which a golden-section search over the logarithm of the temperature finds to 0.1 %.
    """

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(logits_NK / np.exp(logarithm), truth_N))

    low, high = float(np.log(LOWEST)), float(np.log(HIGHEST))
    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-3:
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        of_first, of_second = loss(first), loss(second)
        # If all pixels are correct, the loss is exactly 0 below some temperature. The search ends at the lower bound.
        low, high = (low, second) if of_first < of_second or of_second == 0 else (first, high)
    return round(float(np.exp((low + high) / 2)), 4)


def reliability(probs_NK: Tensor, truth_N: Tensor, bins: int = BINS) -> Reliability:
    """Return the reliability of predictions in `bins` bins of equal width (Guo et al., ICML 2017)."""
    confidence_N, predicted_N = (values.numpy() for values in probs_NK.double().max(dim=1))
    correct_N = predicted_N == truth_N.numpy()
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    count_B = np.bincount(bin_N, minlength=bins)
    divisor_B = np.maximum(count_B, 1)
    return Reliability(
        count_B,
        np.bincount(bin_N, confidence_N, minlength=bins) / divisor_B,
        np.bincount(bin_N, correct_N.astype(float), minlength=bins) / divisor_B,
    )
