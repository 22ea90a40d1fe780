from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.training.evaluate import scores
from tests.bench.patients import compare, interval, miou, patient_counts, score


def counts(seeds: int, patients: int, *, seed: int = 0, better: int = 0) -> NDArray[np.int64]:
    """Return random matrices of two classes; `better` adds correct pixels."""
    rng = np.random.default_rng(seed)
    made_SPXX: NDArray[np.int64] = rng.integers(1, 400, (seeds, patients, 3, 3)) + better * np.diag([1, 1, 0])
    return made_SPXX


def test_the_miou_is_that_of_the_evaluation() -> None:
    many_SPXX = counts(3, 4)
    many_SPXX[0, 0, 1] = many_SPXX[0, 0, :, 1] = 0  # a class that neither truth nor prediction contains
    found_SP = miou(many_SPXX)
    for s, p in product(range(3), range(4)):
        assert found_SP[s, p] == pytest.approx(scores(many_SPXX[s, p], ("a", "b")).miou)


def test_images_of_a_patient_are_added() -> None:
    images = {
        "x": {"case": "2", "counts": [[1, 2], [3, 4]]},
        "y": {"case": "1", "counts": [[5, 0], [0, 0]]},
        "z": {"case": "2", "counts": [[10, 0], [0, 0]]},
    }
    found = patient_counts(images)
    assert list(found) == ["1", "2"]
    assert found["2"].tolist() == [[11, 2], [3, 4]]


def test_the_interval_is_that_of_a_slow_bootstrap_over_patients() -> None:
    made_SPXX = counts(2, 8)
    rng = np.random.default_rng(3)
    slow = [score(made_SPXX[:, rng.integers(8, size=8)]) for _ in range(4000)]
    low, high = interval(made_SPXX)
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.004)
    assert low < score(made_SPXX) < high


def test_the_interval_of_equal_patients_has_no_width() -> None:
    made_SPXX = np.repeat(counts(1, 1), 6, axis=1)
    assert interval(made_SPXX) == pytest.approx((score(made_SPXX),) * 2)


def test_the_p_value_counts_every_exchange_of_patients() -> None:
    first_SPXX, second_SPXX = counts(2, 5, better=60), counts(2, 5, seed=1)
    found = compare(first_SPXX, second_SPXX)
    observed = score(first_SPXX) - score(second_SPXX)
    extreme = 0
    for pattern in product((False, True), repeat=5):
        one, other = first_SPXX.copy(), second_SPXX.copy()
        for p, swap in enumerate(pattern):
            if swap:
                one[:, p], other[:, p] = second_SPXX[:, p], first_SPXX[:, p]
        extreme += abs(score(one) - score(other)) >= abs(observed) - 1e-12
    assert found.difference == pytest.approx(observed)
    assert found.p == extreme / 32
    assert found.low < observed < found.high


def test_a_recipe_does_not_differ_from_itself_and_differs_from_a_much_better_one() -> None:
    made_SPXX = counts(2, 9)
    same = compare(made_SPXX, made_SPXX)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    better = compare(made_SPXX + 2000 * np.diag([1, 1, 0]), made_SPXX)
    assert better.low > 0
    assert better.p == 2 / 2**9


def test_many_patients_are_exchanged_at_random() -> None:
    first_SPXX, second_SPXX = counts(1, 14), counts(1, 14, seed=1)
    assert 0 < compare(first_SPXX, second_SPXX).p <= 1


def test_recipes_with_other_seeds_or_patients_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the same seeds, patients and classes"):
        compare(counts(1, 5), counts(2, 5))
