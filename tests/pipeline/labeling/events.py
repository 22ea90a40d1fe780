"""Short events for the tests of labels."""

from __future__ import annotations

from pipeline.labeling.events import (
    Answer,
    ClassAdded,
    Event,
    FolderStarted,
    Labeled,
    Mark,
    Place,
    Recorded,
    SlideAdded,
)
from pipeline.labeling.labels import Labels

STARTED = FolderStarted(mpp=1.0, side=64, seed=5, blind_share=0.5)
TUMOR = ClassAdded(id=1, name="tumor", color=(200, 0, 0))
STROMA = ClassAdded(id=2, name="stroma", color=(0, 0, 200))
SLIDE = SlideAdded(digest="ab", stamp="s", name="a.svs", patient="a")


def place(x: int) -> Place:
    return Place("ab", float(x), 0.0, 64, 1.0)


def label(x: int, *answers: Answer, mark: Mark = "none") -> Labeled:
    """Return a label of the patch at `x` with answers for classes 1, 2, …"""
    return Labeled(place=place(x), answers=dict(enumerate(answers, start=1)), mark=mark, view="single", reason="random")


def fold(*events: tuple[str, Event]) -> Labels:
    """Return the labels after (annotator, event) pairs; a folder, two classes and a slide come first."""
    first = [("ann", event) for event in (STARTED, TUMOR, STROMA, SLIDE)]
    return Labels(Recorded(n, "2026-01-01T00:00:00", who, e) for n, (who, e) in enumerate([*first, *events], start=1))
