"""Similarity of patches, and the thread that computes their features."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LabelingError
from pipeline.labeling.events import Place
from pipeline.labeling.similar import NEIGHBORS, SimilarPatches, similarity
from tests.pipeline.labeling.events import place
from wsi.errors import SlideReadError


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 6), st.integers(0, 6))
def test_similarity_is_that_of_a_slow_reference(seed: int, n: int, p: int, q: int) -> None:
    rng = np.random.default_rng(seed)
    own, present, absent = (rng.normal(size=(count, 4)).astype(np.float32) for count in (n, p, q))
    middle = np.concatenate([own, present]).mean(axis=0)

    def nearest(one: np.ndarray, others: np.ndarray) -> float:
        cosines = [
            float(
                np.dot(one - middle, other - middle) / (np.linalg.norm(one - middle) * np.linalg.norm(other - middle))
            )
            for other in others
        ]
        return float(np.mean(sorted(cosines)[-NEIGHBORS:]))

    expected = [nearest(one, present) - (nearest(one, absent) if q else 0) for one in own]
    assert similarity(own, present, absent) == pytest.approx(expected, abs=1e-4)


def wait(similar: SimilarPatches, xs: range) -> None:
    while similar.prepare(place(x) for x in xs) and similar.error is None:
        time.sleep(0.005)


def test_features_are_computed_once_and_in_the_background() -> None:
    seen: list[float] = []

    def features(places: list) -> np.ndarray:  # type: ignore[type-arg]  # of places
        seen.extend(one.x_l0 for one in places)
        return np.array([[one.x_l0, 10 - one.x_l0] for one in places], np.float32)

    similar = SimilarPatches(features)  # type: ignore[arg-type]  # a list is a sequence
    assert similar.prepare([place(1)]) == 1
    wait(similar, range(10))
    wait(similar, range(10))
    assert sorted(seen) == [float(x) for x in range(10)]
    ranked = similar.ranked([place(x) for x in (3, 8, 99)], [place(9)], [place(0)])
    assert ranked == [place(8), place(3)], "a patch without features is left out"
    similar.close()


def test_patches_are_ranked_if_none_lacks_the_class() -> None:
    similar = SimilarPatches(lambda places: np.array([[one.x_l0, 10 - one.x_l0] for one in places], np.float32))
    wait(similar, range(10))
    assert similar.ranked([place(3), place(8)], [place(9)], []) == [place(8), place(3)]
    similar.close()


def test_patches_that_cannot_be_read_are_skipped() -> None:
    batches = []

    def features(places: Sequence[Place]) -> np.ndarray:
        batches.append(places)
        if any(one.x_l0 % 4 == 0 for one in places):
            raise SlideReadError("damaged")
        return np.array([[one.x_l0, 10 - one.x_l0] for one in places], np.float32)

    similar = SimilarPatches(features)
    found = similar.fetch([place(x) for x in range(10)])
    assert found is not None
    assert list(found) == [place(x) for x in (1, 2, 3, 5, 6, 7, 9)]
    assert found[place(3)].tolist() == [3, 7]
    assert similar.error is None
    count = len(batches)
    assert similar.prepare(place(x) for x in range(10)) == 0
    assert similar.ranked([place(3), place(4)], [place(9)], [place(0)]) == [place(3)]
    assert similar.ranked([place(3)], [place(8)], []) == [], "no patch with the class can be read"
    similar.close()
    assert len(batches) == count, "they are not read again"


def test_a_slide_that_cannot_be_read_ends_the_wait_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def features(places: object) -> np.ndarray:
        raise LabelingError("gone")

    similar = SimilarPatches(features)
    wait(similar, range(3))
    assert similar.error == "Patches cannot be compared; see the terminal for the reason."
    assert "patches cannot be compared: gone" in caplog.text
    similar.close()
