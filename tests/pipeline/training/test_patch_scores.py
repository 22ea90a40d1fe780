"""Scores of patches against their definitions, patch by patch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.training.patch_scores import PatchResults, balanced_and_exact, drawn_scores, patch_scores

NAMES = ("a", "b", "c")


def share(flags: list[bool]) -> float:
    """Return the share of true flags; NaN without flags."""
    return sum(flags) / len(flags) if flags else math.nan


def drawn(seed: int, patches: int = 40) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return found and labeled classes of random patches, which agree in most."""
    rng = np.random.default_rng(seed)
    present_MK = rng.random((patches, 3)) < [0.5, 0.2, 0.8]
    return present_MK ^ (rng.random((patches, 3)) < 0.2), present_MK


@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_their_definitions(seed: int) -> None:
    found_MK, present_MK = drawn(seed)
    if seed == 0:
        present_MK[:, 1] = False  # a class that no patch has
    scores = patch_scores(found_MK, present_MK, NAMES)
    balanced = []
    for k, name in enumerate(NAMES):
        pairs = list(zip(found_MK[:, k].tolist(), present_MK[:, k].tolist(), strict=True))
        recall = share([found for found, present in pairs if present])
        specificity = share([not found for found, present in pairs if not present])
        assert scores.recall[name] == pytest.approx(recall, nan_ok=True)
        assert scores.specificity[name] == pytest.approx(specificity, nan_ok=True)
        assert scores.precision[name] == pytest.approx(share([present for found, present in pairs if found]))
        if not math.isnan(recall + specificity):
            balanced.append((recall + specificity) / 2)
    assert len(balanced) == (2 if seed == 0 else 3)
    assert scores.balanced == pytest.approx(sum(balanced) / len(balanced))
    assert scores.exact == share([f == p for f, p in zip(found_MK.tolist(), present_MK.tolist(), strict=True)])


def test_a_class_that_is_never_shown_has_no_precision() -> None:
    scores = patch_scores(np.zeros((2, 3), bool), np.ones((2, 3), bool), NAMES)
    assert all(math.isnan(value) for value in [*scores.precision.values(), *scores.specificity.values()])
    assert set(scores.recall.values()) == {0.0}


def test_there_is_no_balanced_accuracy_if_every_class_is_in_all_patches_or_in_none() -> None:
    found_MK, present_MK = np.array([[True, False], [True, True]]), np.array([[True, False]] * 2)
    balanced, exact = balanced_and_exact(found_MK, present_MK)
    assert math.isnan(balanced)
    assert exact == 0.5
    one = {"x": found_MK[:1], "y": found_MK[1:]}
    ours = PatchResults(
        ("a", "b"), 0.05, {"x": present_MK[:1], "y": present_MK[1:]}, {True: one, False: one}, {"x": "x", "y": "y"}
    )
    balanced, exact = ours.spread()
    assert math.isnan(balanced)
    assert exact == pytest.approx(np.sqrt(1 / 8), rel=0.1)


def test_draws_without_a_balanced_accuracy_do_not_add_to_its_spread() -> None:
    # Right in every patch that has class b, and wrong in every patch without it: 1/2 whenever a draw has both.
    present = {"x": np.array([[True, True]]), "y": np.array([[True, False]])}
    found = {name: np.array([[True, True]]) for name in present}
    ours = PatchResults(("a", "b"), 0.05, present, {True: found, False: found}, {"x": "x", "y": "y"})
    assert ours.scores().balanced == 0.5
    balanced, exact = ours.spread()
    assert balanced == 0
    assert exact == pytest.approx(np.sqrt(1 / 8), rel=0.1)


def results(groups: list[str]) -> PatchResults:
    """Return results of one image with two patches per group name; without the gate, every answer is right."""
    found_MK, present_MK = drawn(7, 2 * len(groups))
    names = [f"image {n}" for n in range(len(groups))]
    present, found = (dict(zip(names, np.split(of_MK, len(groups)), strict=True)) for of_MK in (present_MK, found_MK))
    return PatchResults(NAMES, 0.05, present, {True: found, False: present}, dict(zip(names, groups, strict=True)))


def test_the_spread_is_the_bootstrap_deviation_over_cases() -> None:
    groups = ["x", "y", "x", "z", "y", "w", "v"]
    ours = results(groups)
    rng, draws = np.random.default_rng(3), []
    for _ in range(4000):
        cases = [sorted(set(groups))[n] for n in rng.integers(5, size=5)]
        images = [n for case in cases for n, group in enumerate(groups) if group == case]
        pair = (np.concatenate([of[f"image {n}"] for n in images]) for of in (ours.found[True], ours.present))
        draws.append(balanced_and_exact(*pair))
    assert ours.spread() == pytest.approx(np.nanstd(draws, axis=0), rel=0.1)
    assert ours.spread() == ours.spread()
    assert ours.scores(gate=False).exact == 1.0


def test_a_single_case_has_no_spread() -> None:
    assert all(math.isnan(value) for value in results(["x", "x"]).spread())


def test_a_draw_takes_whole_parts() -> None:
    found_MK, present_MK = np.array([[True], [False], [True], [True]]), np.array([[True], [True], [False], [False]])
    # Part 0 is half right, part 1 all wrong: a draw is one of them twice, or both.
    drawn = drawn_scores(balanced_and_exact, found_MK, present_MK, [np.array([0, 1]), np.array([2, 3])], 200)
    assert set(drawn[:, 1]) == {0.5, 0.25, 0.0}
