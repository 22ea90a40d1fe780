"""Which patches to label next once there are labels: those that a light model is least certain of.

A thread does all the work. The page never waits for it: until it has picked, patches come in random order.
docs/benchmarks/label-order.md compares this with other orders.

Shape suffixes: L labeled patches, N candidates, M both, F features, X classes and "artifact".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline.labeling.events import Place
from pipeline.labeling.labels import Verdict
from pipeline.labeling.presence_head import fit_head
from pipeline.labeling.session import Session
from pipeline.labeling.similar import SimilarPatches
from pipeline.labeling.uncertain import best_of_clusters, entropy
from wsi.errors import WsiSegmentError

log = logging.getLogger(__name__)

START = 50
"""Number of labels before the first round of picks."""

STEP = 10
"""Number of new, changed or undone labels between two rounds, and of picks per round."""

CANDIDATES = 500
"""Unlabeled patches among which a round picks, taken from all open slides in turn."""

MIN_ARTIFACTS = 5
"""If at least this many labels are artifacts, patches that look like artifacts are not picked."""

_ANSWERS = {"present": 1.0, "absent": 0.0, "unknown": np.nan}


class Picks:
    """The patches to label next, chosen again after every `STEP` labels. Call `close` last."""

    def __init__(self, session: Session, similar: SimilarPatches) -> None:
        self._session = session
        self._similar = similar
        self._condition = threading.Condition()
        self._changed = self._ended = False
        self._learned: dict[Place, Verdict] = {}
        self._best: tuple[Place, ...] = ()
        self._thread = threading.Thread(target=self._work, name="picks", daemon=True)
        self._thread.start()

    def best(self) -> tuple[Place, ...]:
        """Return the picks of the latest round, the most uncertain first. Some may be labeled by now."""
        with self._condition:
            return self._best

    def changed(self) -> None:
        """Look at the labels and the open slides again, in the background."""
        with self._condition:
            self._changed = True
            self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._changed or self._ended)
                self._changed = False
                if self._ended:
                    return
            try:
                self._pick()
            except (WsiSegmentError, OSError, MemoryError, ValueError) as error:
                log.error("patches come in random order from now on: %s", error)
                with self._condition:
                    self._best = ()
                return

    def _pick(self) -> None:
        """Learn the labels and pick, if enough labels are new, changed or undone since the round before."""
        verdicts = self._session.verdicts()
        changed = [at for at in verdicts | self._learned if verdicts.get(at) != self._learned.get(at)]
        if len(verdicts) < START or (self._best and len(changed) < STEP):
            return
        candidates = list(islice(self._session.unseen(), CANDIDATES))
        features = self._similar.fetch([*verdicts, *candidates])
        if features is None:
            return
        self._learned = verdicts
        verdicts = {place: verdict for place, verdict in verdicts.items() if place in features}
        candidates = [place for place in candidates if place in features]
        if not verdicts or not candidates:
            return
        features_LF, features_NF = (np.array([features[one] for one in group]) for group in (verdicts, candidates))
        found = picked(features_LF, answers_of(verdicts), features_NF)
        with self._condition:
            self._best = tuple(candidates[n] for n in found)

    def close(self) -> None:
        """Stop after the round that is being computed. Close the `SimilarPatches` first, which may be waited for."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        self._thread.join()


def answers_of(verdicts: Mapping[Place, Verdict]) -> NDArray[np.float64]:
    """Return the answers for each class and, last, for "artifact" (L, X): 1 present, 0 absent, NaN unknown."""
    rows = [
        [*(_ANSWERS[answer] for answer in verdict.answers.values()), float(verdict.mark == "artifact")]
        for verdict in verdicts.values()
    ]
    return np.array(rows)


def picked(
    features_LF: NDArray[np.float32], answers_LX: NDArray[np.float64], features_NF: NDArray[np.float32]
) -> list[int]:
    """Return the candidates to label next: the most uncertain of each of `STEP` clusters, the most uncertain first.

    Candidates that look like artifacts are left out.
    """
    logits_NX = fit_head(features_LF, answers_LX).logits(features_NF)
    artifacts = (answers_LX[:, -1] == 1).sum()
    kept = np.flatnonzero((logits_NX[:, -1] < 0) | (artifacts < MIN_ARTIFACTS))
    if not len(kept):
        return []
    score_N = entropy(logits_NX[kept, :-1], answers_LX[:, :-1])
    # Seeded, so that the same labels give the same picks.
    rng = np.random.default_rng(len(answers_LX))
    return [int(kept[n]) for n in best_of_clusters(features_NF[kept], score_N, STEP, rng)]
