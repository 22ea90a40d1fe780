"""Which patches a light model picks, and that they come next without a wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from numpy.typing import NDArray

from models.bundle import Bundle
from pipeline.errors import LabelingError
from pipeline.labeling import picks as picks_module
from pipeline.labeling.desk import Desk
from pipeline.labeling.events import Labeled, Place
from pipeline.labeling.folder import add_classes
from pipeline.labeling.labels import Verdict
from pipeline.labeling.picks import STEP, answers_of, picked
from pipeline.labeling.presence_head import PENALTY, fit_head
from pipeline.labeling.store import EventStore
from pipeline.labeling.uncertain import best_of_clusters, entropy
from tests.pipeline.labeling.blobs import blobs
from tests.pipeline.labeling.desks import damage, desk, label_slide, save
from tests.pipeline.labeling.events import place


def test_the_head_has_the_weights_of_an_independent_solver_and_skips_unknown_answers() -> None:
    rng = np.random.default_rng(1)
    x_LF = rng.normal(size=(40, 3)).astype(np.float32)
    answer_L = (x_LF[:, 0] + 0.5 * rng.normal(size=40) > 0).astype(float)
    answer_L[::4] = np.nan
    head = fit_head(x_LF, np.stack([answer_L, np.full(40, np.nan)], axis=1))
    known_L = ~np.isnan(answer_L)
    scaled_LF = ((x_LF - x_LF.mean(axis=0)) / x_LF.std(axis=0))[known_L]

    def loss(w: NDArray[np.float64]) -> float:
        p_L = 1 / (1 + np.exp(-(scaled_LF @ w[:3] + w[3])))
        return float(
            -np.where(answer_L[known_L] == 1, np.log(p_L), np.log(1 - p_L)).mean() + PENALTY * (w[:3] ** 2).sum()
        )

    slow = scipy.optimize.minimize(loss, np.zeros(4), method="Nelder-Mead", options={"maxiter": 5000, "xatol": 1e-6})
    np.testing.assert_allclose(np.append(head.weight_FK[:, 0], head.bias_K[0]), slow.x, atol=5e-3)
    assert (head.logits(x_LF)[:, 1] == 0).all(), "nothing is known of the second class"


def test_entropies_are_summed_and_rare_answers_count_more() -> None:
    logits_NK = np.array([[0.0, 5.0], [4.0, 0.0], [800.0, -800.0]])
    # Class 0 is present in 3 of 4 labels, class 1 in 2, and one answer is unknown.
    answers_LK = np.array([[1, 1], [1, 1], [1, 0], [0, np.nan]])

    def nats(z: float) -> float:
        return -sum(float(p * np.log(p)) for p in (1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))))

    expected = [*(nats(a) / 2 + nats(b) / 2 for a, b in logits_NK[:2]), 0]
    np.testing.assert_allclose(entropy(logits_NK, answers_LK), expected, atol=1e-12)


def test_the_best_patch_of_each_cluster_is_taken() -> None:
    rng = np.random.default_rng(0)
    features_NF, _ = blobs(rng, (30, 30, 30))
    score_N = np.arange(90) % 30 + np.repeat([0.0, 0.1, 0.5], 30)
    # The best 30 patches are ten of each cluster.
    assert best_of_clusters(features_NF, score_N, 3, rng) == [89, 59, 29]


def test_candidates_between_the_classes_are_picked_and_those_like_artifacts_are_not() -> None:
    rng = np.random.default_rng(2)
    features_LF, cluster_L = blobs(rng, (40, 40, 20))
    nan = np.nan
    answers_LX = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [nan, nan, 1.0]])[cluster_L]
    sure_NF, _ = blobs(rng, (100, 100, 100))
    between_NF = np.array([[5, 5, 0]], np.float32) + rng.normal(size=(30, 3)).astype(np.float32) / 2
    features_NF = np.concatenate([sure_NF, between_NF])
    found = picked(features_LF, answers_LX, features_NF)
    assert 0 < len(found) <= STEP
    assert all(n >= 300 for n in found[:3]), "the most uncertain ones lie between the classes"
    assert not any(200 <= n < 300 for n in found)
    answers_LX[:, 2] = 0
    answers_LX[80:, :2] = 0.0
    assert picked(features_LF, answers_LX, features_NF[:0]) == []


def test_answers_become_numbers_with_artifacts_last() -> None:
    verdicts = {
        place(1): Verdict({1: "present", 2: "absent"}, "none", disputed=False),
        place(2): Verdict({1: "unknown", 2: "unknown"}, "artifact", disputed=False),
    }
    np.testing.assert_array_equal(answers_of(verdicts), [[1, 0, 0], [np.nan, np.nan, 1]])


def until(true: Callable[[], object]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened for 20 seconds")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pick after a few labels, among a few candidates."""
    monkeypatch.setattr(picks_module, "START", 8)
    monkeypatch.setattr(picks_module, "CANDIDATES", 24)


def label_some(at: Desk, count: int) -> list[Place]:
    patches = at.session.upcoming(count)
    for n, patch in enumerate(patches):
        save(at, patch, 1 + n % 2)
    return [patch.place for patch in patches]


@pytest.mark.usefixtures("few")
def test_picks_come_after_the_patches_that_the_page_knows_and_the_event_has_the_reason(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        known = at.session.upcoming(11)[8:]
        label_some(at, 8)
        until(at.session.picks)
        offered = at.session.upcoming(9)
        assert offered[:3] == known
        picked_ = [patch.place for patch in offered[3:] if patch.reason == "uncertain"]
        left = [place for place in at.session.picks() if place not in {patch.place for patch in known}]
        assert picked_ == left[: len(picked_)]
        assert all(patch.reason == ("blind" if patch.blind else "uncertain") for patch in offered[3:])
        one = next(patch for patch in offered if patch.reason == "uncertain")
        save(at, one, 1)
        assert one.place not in [patch.place for patch in at.session.upcoming(30)]
    with EventStore(tmp_path / "l" / "labels.sqlite") as store:
        event = store.read()[-1].event
    assert isinstance(event, Labeled)
    assert (event.place, event.reason, event.model) == (one.place, "uncertain", shipped.digest)


@pytest.mark.usefixtures("few")
def test_patches_that_cannot_be_read_are_not_picked(tmp_path: Path, shipped: Bundle) -> None:
    slide = label_slide(tmp_path / "a.svs")
    corners = [(x, y) for x in (384, 512) for y in (256, 384)]
    for x, y in corners:
        damage(slide, x, y)
    with desk(tmp_path / "l", [slide], shipped) as at:
        candidates = list(islice(at.session.unseen(), 24))
        lost = [one for one in candidates if (one.x_l0 // 128 * 128, one.y_l0 // 128 * 128) in corners]
        assert lost
        label_some(at, 8)
        until(at.session.picks)
        assert not set(at.session.picks()) & set(lost)
        assert at.similar.error is None


@pytest.mark.usefixtures("few")
def test_a_session_that_continues_picks_at_once_and_never_a_blind_patch(
    tmp_path: Path, slides: list[Path], shipped: Bundle
) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        label_some(at, 8)
    with desk(tmp_path / "l", slides, shipped) as at:
        until(at.session.picks)
        assert len(at.session.picks()) <= STEP
        assert not any(at.session.patch(place, "uncertain").blind for place in at.session.picks())


@pytest.mark.usefixtures("few")
def test_picks_learn_from_labels_that_were_changed_or_completed(
    tmp_path: Path, slides: list[Path], shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[NDArray[np.float64]] = []

    def recorded(
        features_LF: NDArray[np.float32], answers_LX: NDArray[np.float64], *more: NDArray[np.float32]
    ) -> object:
        learned.append(answers_LX)
        return picked(features_LF, answers_LX, *more)

    monkeypatch.setattr(picks_module, "picked", recorded)
    monkeypatch.setattr(picks_module, "START", STEP + 1)
    with desk(tmp_path / "l", slides, shipped) as at:
        label_some(at, STEP + 1)
        until(at.session.picks)
        first, *others = at.session.history()
        for patch in others:
            save(at, patch, 1, 2)
        until(lambda: len(learned) == 2)
        assert (learned[-1][:, :2].sum(axis=1) == 2).sum() == STEP
        with EventStore(tmp_path / "l" / "labels.sqlite") as other:
            add_classes(other, "ann", ["necrosis"], {})
        save(at, first, 1, 3)
        until(lambda: learned[-1].shape == (STEP + 1, 4))
        for patch in others:
            save(at, patch, 1, 3)
        until(lambda: (learned[-1][:, 2] == 1).sum() >= STEP)


def test_blind_patches_keep_their_share_among_picks(tmp_path: Path, slides: list[Path], shipped: Bundle) -> None:
    with desk(tmp_path / "l", slides, shipped) as at:
        at.session.picks = lambda: [p for p, _ in zip(at.session.unseen(), range(60), strict=False)]
        offered = at.session.upcoming(60)
        blind = [patch.place for patch in offered if patch.reason == "blind"]
        assert 6 <= len(blind) <= 24, "a quarter of 60"
        assert {patch.reason for patch in offered} == {"blind", "uncertain"}
        at.session.picks = lambda: ()
    with desk(tmp_path / "m", slides, shipped) as at:
        ordered = [patch.place for patch in at.session.upcoming(150) if patch.blind]
        assert blind == ordered[: len(blind)], "the same blind patches in the same order as without picks"


@pytest.mark.usefixtures("few")
def test_features_that_cannot_be_computed_leave_the_random_order(
    tmp_path: Path,
    slides: list[Path],
    shipped: Bundle,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> NDArray[np.uint8]:
        raise LabelingError("gone")

    with desk(tmp_path / "l", slides, shipped) as at:
        monkeypatch.setattr(at.slides, "pixels", gone)
        label_some(at, 8)
        until(lambda: at.similar.error)
        assert at.session.picks() == ()
        assert {patch.reason for patch in at.session.upcoming(20)} <= {"random", "blind"}
    assert "patches cannot be compared: gone" in caplog.text
