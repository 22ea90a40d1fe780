"""How well a map agrees with the presence labels of patches. Pixels of masks are never used.

A class counts as found in a patch if the map gives it more than a minimum share of the patch.

Shape suffixes: M labeled patches, B those of one image, K classes, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.training.dataset import Sample
from pipeline.training.dataset_card import DatasetCard
from pipeline.training.dataset_sections import CropLabels

SMALLEST_SHARE = 0.05
"""Minimum share of a patch for a class to be found in a map, if no rule of the data set made the labels from masks."""


@dataclass(frozen=True)
class PatchScores:
    """Agreement of found and labeled classes; NaN if a score is undefined."""

    recall: dict[str, float]
    """By class: share of the patches with the class in which the map shows it."""
    specificity: dict[str, float]
    """By class: share of the patches without the class in which the map does not show it."""
    precision: dict[str, float]
    """By class: share of the patches in which the map shows the class that have it."""
    balanced: float
    """Mean of recall and specificity over the classes that some patches have and others lack; NaN without such a
    class."""
    exact: float
    """Share of the patches with every class right."""


@dataclass(frozen=True)
class PatchResults:
    """The classes of the labeled patches of one split, and the classes that a map shows in them."""

    names: tuple[str, ...]
    minimum: float
    """A class counts as found if it covers a larger share of a patch."""
    present: Mapping[str, NDArray[np.bool_]]
    """Labeled classes (B, K) of each image, by sample name."""
    found: Mapping[bool, Mapping[str, NDArray[np.bool_]]]
    """Found classes (B, K) of each image, with the gate (True) and without it."""
    groups: Mapping[str, str]
    """Case of each image, or its own name if the data set has no cases."""

    @property
    def patches(self) -> dict[str, int]:
        """Return the number of patches with each class."""
        counts_K = self._present_MK().sum(axis=0).tolist()
        return dict(zip(self.names, counts_K, strict=True))

    @property
    def count(self) -> int:
        """Return the number of patches."""
        return len(self._present_MK())

    def scores(self, *, gate: bool = True) -> PatchScores:
        """Return the scores of all patches."""
        return patch_scores(self._found_MK(gate), self._present_MK(), self.names)

    def spread(self, draws: int = 1000) -> tuple[float, float]:
        """Return the bootstrap standard deviations of `balanced` and `exact` over cases, with the gate.

        Each draw takes as many cases with replacement (Efron 1979). Draws without `balanced` do not count for its
        deviation. The result is deterministic; NaN with one case or if the score is undefined.
        """
        number = {case: n for n, case in enumerate(dict.fromkeys(self.groups.values()))}
        if len(number) < 2:
            return np.nan, np.nan
        case_M = np.repeat([number[self.groups[name]] for name in self.present], [*map(len, self.present.values())])
        parts = np.split(np.argsort(case_M, kind="stable"), np.cumsum(np.bincount(case_M))[:-1])
        drawn_D2 = drawn_scores(balanced_and_exact, self._found_MK(True), self._present_MK(), parts, draws)
        balanced_D, exact_D = drawn_D2.T
        balanced_D = balanced_D[~np.isnan(balanced_D)]
        return float(balanced_D.std()) if len(balanced_D) else np.nan, float(exact_D.std())

    def mistakes(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the classes that the map shows in patches of an image without them, and those that it misses there."""
        found_BK, present_BK = self.found[True][name], self.present[name]
        wrong_BK = found_BK != present_BK
        return self._names(wrong_BK & found_BK), self._names(wrong_BK & present_BK)

    def wrong(self, name: str) -> int:
        """Return the number of wrong answers, one per patch and class, in an image, with the gate."""
        return int((self.found[True][name] != self.present[name]).sum())

    def _names(self, chosen_BK: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(name for name, chosen_B in zip(self.names, chosen_BK.T, strict=True) if chosen_B.any())

    def _present_MK(self) -> NDArray[np.bool_]:
        return np.concatenate(list(self.present.values()))

    def _found_MK(self, gate: bool) -> NDArray[np.bool_]:
        return np.concatenate([self.found[gate][name] for name in self.present])


def smallest_share(card: DatasetCard, chosen: Sequence[Sample]) -> float:
    """Return the share of a patch above which the presence labels of these images count a class as present.

    It is `SMALLEST_SHARE` if the labels were not read from masks, or if the data set does not set `mask_minimum`: the
    default of that key labels a single pixel, but a map always has a few wrong ones.
    """
    if isinstance(card.labels, CropLabels):
        return card.labels.minimum
    from_masks = all(sample.labels_K is None for sample in chosen)
    return card.labels.mask_minimum if from_masks and "mask_minimum" in card.labels.model_fields_set else SMALLEST_SHARE


def patch_scores(found_MK: NDArray[np.bool_], present_MK: NDArray[np.bool_], names: Sequence[str]) -> PatchScores:
    """Return the scores of found against labeled classes."""
    hits_K = (found_MK & present_MK).sum(axis=0)
    rejected_K = (~found_MK & ~present_MK).sum(axis=0)
    balanced, exact = balanced_and_exact(found_MK, present_MK)
    return PatchScores(
        _shares(hits_K, present_MK.sum(axis=0), names),
        _shares(rejected_K, (~present_MK).sum(axis=0), names),
        _shares(hits_K, found_MK.sum(axis=0), names),
        balanced,
        exact,
    )


def balanced_and_exact(found_MK: NDArray[np.bool_], present_MK: NDArray[np.bool_]) -> tuple[float, float]:
    """Return `balanced` and `exact` of `PatchScores`."""
    accuracies = []
    for k in range(present_MK.shape[1]):
        truth_M = present_MK[:, k]
        if truth_M.any() and not truth_M.all():
            accuracies.append((found_MK[truth_M, k].mean() + (~found_MK[~truth_M, k]).mean()) / 2)
    return float(np.mean(accuracies)) if accuracies else np.nan, float((found_MK == present_MK).all(axis=1).mean())


def drawn_scores(
    score: Callable[[NDArray[np.bool_], NDArray[np.bool_]], tuple[float, float]],
    found_MK: NDArray[np.bool_],
    present_MK: NDArray[np.bool_],
    parts: Sequence[NDArray[np.int64]],
    draws: int,
) -> NDArray[np.float64]:
    """Return `score` (draws, 2) of as many parts drawn with replacement. The result is deterministic.

    `parts` has the indices of the patches of each image or case.
    """
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(draws):
        drawn_M = np.concatenate([parts[n] for n in rng.integers(len(parts), size=len(parts))])
        scores.append(score(found_MK[drawn_M], present_MK[drawn_M]))
    return np.array(scores)


def _shares(counts_K: NDArray[np.int64], totals_K: NDArray[np.int64], names: Sequence[str]) -> dict[str, float]:
    shares_K = np.divide(counts_K, totals_K, out=np.full(len(names), np.nan), where=totals_K > 0)
    return dict(zip(names, shares_K.tolist(), strict=True))
