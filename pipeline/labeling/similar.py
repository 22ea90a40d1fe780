"""The features of patches, and the patches that look like those in which a class is present, for the grid.

Shape suffixes: N patches, P patches with the class, A patches without it, F features.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.labeling.events import Place
from wsi.errors import SlideReadError, WsiSegmentError

log = logging.getLogger(__name__)

POOL = 160
"""Unlabeled patches that are compared for one grid."""

NEIGHBORS = 3

_AT_ONCE = 8

Features = Callable[[Sequence[Place]], NDArray[np.float32]]
"""Returns the features (N, F) of patches. May take a second. Raises SlideReadError if a patch cannot be read."""


class SimilarPatches:
    """The features of patches, computed in the background. Threads may share it. Call `close` last.

    Patches that cannot be read have no features, and are not read again by this object.
    """

    def __init__(self, features: Features) -> None:
        self._features = features
        self._known: dict[Place, NDArray[np.float32]] = {}
        self._unreadable: set[Place] = set()
        self._wanted: list[Place] = []
        self._later: list[Place] = []
        self._condition = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """Why no features can be computed; None as long as they can."""

    def prepare(self, places: Iterable[Place]) -> int:
        """Compute the features of these patches next. Return how many of them are still missing."""
        with self._condition:
            self._wanted = self._missing(places)
            self._start()
            return len(self._wanted)

    def fetch(self, places: Sequence[Place]) -> dict[Place, NDArray[np.float32]] | None:
        """Return the features (F,) of the patches that can be read. They are computed after those of `prepare`.

        Return None if they cannot be computed, or if this object is closed meanwhile. Call it from one thread only.
        """
        with self._condition:
            self._later = self._missing(places)
            self._start()
            self._condition.wait_for(lambda: not self._later or self._ended or self.error is not None)
            return None if self._later else {place: self._known[place] for place in places if place in self._known}

    def _missing(self, places: Iterable[Place]) -> list[Place]:
        return [one for one in dict.fromkeys(places) if one not in self._known and one not in self._unreadable]

    def _start(self) -> None:
        if (self._wanted or self._later) and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="features", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def ranked(self, candidates: Sequence[Place], present: Sequence[Place], absent: Sequence[Place]) -> list[Place]:
        """Return the candidates whose features are known, the most similar to `present` first.

        `similarity` is the measure. Empty if no patch of `present` has known features.
        """
        with self._condition:
            known = [place for place in candidates if place in self._known]
            groups = [[self._known[p] for p in group if p in self._known] for group in (known, present, absent)]
        if not known or not groups[1]:
            return []
        length = len(groups[0][0])  # an empty group does not show it
        score_N = similarity(*(np.array(group, np.float32).reshape(len(group), length) for group in groups))
        return [known[i] for i in np.argsort(-score_N, kind="stable")]

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._later or self._ended)
                if self._ended:
                    return
                batch = (self._wanted or self._later)[:_AT_ONCE]
            try:
                found = self._features_of(batch)
            except (WsiSegmentError, OSError, MemoryError) as error:
                log.error("patches cannot be compared: %s", str(error) or type(error).__name__)
                with self._condition:
                    self.error = "Patches cannot be compared; see the terminal for the reason."
                    self._condition.notify_all()
                return
            with self._condition:
                self._known.update(found)
                self._unreadable |= set(batch) - found.keys()
                self._wanted, self._later = self._missing(self._wanted), self._missing(self._later)
                self._condition.notify_all()

    def _features_of(self, batch: Sequence[Place]) -> dict[Place, NDArray[np.float32]]:
        """Return the features (F,) of the patches that can be read."""
        try:
            return dict(zip(batch, self._features(batch), strict=True))
        except SlideReadError as error:
            if len(batch) == 1:
                log.warning("a patch cannot be compared: %s", error)
                return {}
            return {place: found for one in batch for place, found in self._features_of([one]).items()}

    def close(self) -> None:
        """Stop after the batch that is being computed."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()


def similarity(
    features_NF: NDArray[np.float32], present_PF: NDArray[np.float32], absent_AF: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return how much more similar patches are to those with a class than to those without it, (N,).

    Similarity is the mean cosine to the nearest `NEIGHBORS`, after the mean of all features is subtracted. Without
    patches that lack the class, only the first part counts.
    """
    middle_F = np.concatenate([features_NF, present_PF]).mean(axis=0)
    own_NF = _unit(features_NF - middle_F)
    score_N = _nearest(own_NF, _unit(present_PF - middle_F))
    if len(absent_AF):
        score_N = score_N - _nearest(own_NF, _unit(absent_AF - middle_F))
    return score_N


def _unit(features_NF: NDArray[np.float32]) -> NDArray[np.float32]:
    length_N1 = np.linalg.norm(features_NF, axis=1, keepdims=True)
    return np.asarray(features_NF / np.maximum(length_N1, 1e-12), np.float32)


def _nearest(own_NF: NDArray[np.float32], other_MF: NDArray[np.float32]) -> NDArray[np.float32]:
    cosine_NM = own_NF @ other_MF.T
    cosine_NM.sort(axis=1)
    return np.asarray(cosine_NM[:, -NEIGHBORS:].mean(axis=1), np.float32)
