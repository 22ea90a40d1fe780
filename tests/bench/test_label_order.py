"""The simulation of labeling: its orders, its measures and its tables, on patches of known clusters."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.bench.label_order import STRATEGIES, Person, draw, held_out, presence_f1, run, table
from tests.bench.label_pool import Pool, box_mean
from tests.bench.typical import typical
from tests.pipeline.labeling.blobs import blobs


def test_typical_patches_come_one_from_each_cluster_the_largest_first() -> None:
    rng = np.random.default_rng(0)
    features_NF, cluster_N = blobs(rng, (30, 60, 45))
    found = typical(features_NF, [], 3, rng)
    assert cluster_N[found].tolist() == [1, 2, 0]
    for patch in found:
        own = features_NF[cluster_N == cluster_N[patch]]
        distance = np.sort(np.linalg.norm(own[:, None] - own, axis=2), axis=1)[:, 1:21].mean(axis=1)
        assert np.array_equal(features_NF[patch], own[distance.argmin()]), "the patch in the densest part"


def test_clusters_with_a_label_are_not_asked_for_again() -> None:
    rng = np.random.default_rng(0)
    features_NF, cluster_N = blobs(rng, (30, 60, 45))
    (found,) = typical(features_NF, [0, 40], 1, rng)
    assert cluster_N[found] == 2


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Return 12 images of four patients, each with 80 patches of two classes that the features tell apart."""
    rng = np.random.default_rng(3)
    truth_HW = np.zeros((32, 32), np.uint8)
    truth_HW[:, 16:] = 1
    present_NK = rng.integers(2, size=(12 * 80, 2)).astype(bool)
    features_NF = (3.0 * present_NK + rng.normal(size=present_NK.shape)).astype(np.float32)
    map_Fhw = np.stack([3.0 * (truth_HW[::8, ::8] == k) for k in range(2)]).astype(np.float16)
    images = (np.repeat(np.arange(12), 80), np.repeat(["a", "b", "c", "d"], 3), (map_Fhw,) * 12, (truth_HW,) * 12)
    return Pool(("x", "y"), features_NF, present_NK, *images)


def test_a_patient_is_tested_or_trained_on_and_each_is_tested_by_one_seed(pool: Pool) -> None:
    tested = np.array([held_out(pool.group_I, seed) for seed in range(3)])
    assert tested.sum(axis=0).tolist() == [1] * 12
    assert sorted(set(pool.group_I[tested[0]])) == ["a", "d"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_an_order_yields_each_patch_once_and_depends_on_the_seed_alone(pool: Pool, strategy: str) -> None:
    def first(seed: int) -> list[int]:
        groups = list(np.arange(300).reshape(3, 100))
        of = Person(pool.features_NF[:300], pool.present_NK[:300], groups, np.random.default_rng(seed))
        for patch in islice(STRATEGIES[strategy](of), 90):
            of.labeled.append(patch)
        return of.labeled

    assert len(set(first(0))) == 90
    assert first(0) == first(0)
    if strategy == "random":
        assert [patch // 100 for patch in first(0)] == [0, 1, 2] * 30, "in turn from each patient"


def test_present_and_absent_count_alike() -> None:
    truth_NK = np.array([[1], [1], [1], [0]], dtype=bool)
    assert presence_f1(truth_NK, truth_NK) == 1
    # Present: three of three found, one wrong: 6/7. Absent: none.
    assert presence_f1(truth_NK, np.ones((4, 1), dtype=bool)) == pytest.approx(3 / 7)


def test_features_are_means_over_the_cells_of_a_patch() -> None:
    map_Fhw = np.arange(2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16)
    np.testing.assert_allclose(box_mean(map_Fhw, np.array([64, 0, 64, 64])), map_Fhw[:, :8, 8:].mean(axis=(1, 2)))


def test_finished_runs_are_kept_and_become_a_table_and_a_plot(pool: Pool, tmp_path: Path) -> None:
    for strategy in (*STRATEGIES, "all"):
        run(pool, "glas", strategy, 0, tmp_path, budgets=(10, 60))
    files = sorted(tmp_path.glob("*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    run(pool, "glas", "random", 0, tmp_path, budgets=(10, 60))
    assert [file.stat().st_mtime_ns for file in files] == before
    results = [json.loads(file.read_text()) for file in files]
    every = next(one for one in results if one["strategy"] == "all")
    # The features of a cell are its class, so a head that has learned all patches finds the map.
    assert every["at"]["480"]["miou"] > 0.95
    random = next(one for one in results if one["strategy"] == "random")
    cells = " | ".join(f"{100 * at['miou']:.1f}" for at in (*random["at"].values(), every["at"]["480"]))
    assert f"| glas | random | {cells} |" in table(results)
    draw(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
