"""What the events of a labels folder add up to: classes, slides, and the current label of each patch."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from models.tissue_class import Color, Role
from pipeline.labeling.events import (
    Answer,
    ClassAdded,
    ClassesMerged,
    ClassRemoved,
    ClassRenamed,
    FolderStarted,
    Labeled,
    Mark,
    Place,
    Recorded,
    SlideAdded,
    Undone,
)
from pipeline.labeling.masks import Areas, joined


@dataclass(frozen=True)
class LabelClass:
    """A class as it is now."""

    id: int
    name: str
    color: Color
    role: Role
    former_names: tuple[str, ...] = ()
    """The latest first."""


@dataclass(frozen=True)
class Verdict:
    """What all annotators together say about a patch."""

    answers: Mapping[int, Answer]
    """Answer for each current class."""
    mark: Mark
    disputed: bool
    """Whether two annotators contradict each other about a class, or about whether to leave the patch out."""


class Labels:
    """The current state, which follows the events. Not for several threads."""

    def __init__(self, records: Iterable[Recorded] = ()) -> None:
        self.number = 0
        """Number of the last event that is part of the state."""
        self.settings: FolderStarted | None = None
        self.slides: dict[str, SlideAdded] = {}
        self.classes: dict[int, LabelClass] = {}
        """Current classes by number, without those that were merged into others or removed."""
        self._target: dict[int, int | None] = {}
        """The class that a merged class was merged into; None for a removed class."""
        self._labels: dict[Place, dict[str, list[Recorded]]] = defaultdict(lambda: defaultdict(list))
        self._order: dict[int, tuple[str, Place]] = {}
        for record in records:
            self.apply(record)

    def apply(self, record: Recorded) -> None:
        """Add the next event.

        A change of a class that no longer exists is ignored, and so is a merge of a class into itself: earlier versions
        saved such events when two processes changed classes at the same time.
        """
        self.number = record.number
        match record.event:
            case FolderStarted() as event:
                self.settings = self.settings or event
            case SlideAdded() as event:
                self.slides[event.digest] = event
            case ClassAdded() as event:
                self.classes[event.id] = LabelClass(event.id, event.name, event.color, event.role)
            case ClassRenamed() as event:
                if event.id in self.classes:
                    old = self.classes[event.id]
                    former_names = (old.name, *old.former_names)
                    self.classes[event.id] = replace(old, name=event.name, former_names=former_names)
            case ClassesMerged() as event:
                into = self._current(event.into)
                if event.id in self.classes and into in self.classes and into != event.id:
                    self._target[event.id] = into
                    del self.classes[event.id]
            case ClassRemoved() as event:
                if event.id in self.classes:
                    self._target[event.id] = None
                    del self.classes[event.id]
            case Labeled() as event:
                self._labels[event.place][record.annotator].append(record)
                self._order[record.number] = (record.annotator, event.place)
            case Undone() as event:
                for number in event.numbers:
                    self._undo(number)

    def _undo(self, number: int) -> None:
        found = self._order.pop(number, None)
        if found is not None:
            annotator, place = found
            kept = [one for one in self._labels[place][annotator] if one.number != number]
            self._labels[place][annotator] = kept

    @property
    def class_ids(self) -> set[int]:
        """Return the numbers of all classes, also of those that were merged into others or removed."""
        return {*self.classes, *self._target}

    @property
    def removed_ids(self) -> set[int]:
        """Return the numbers of the classes that were removed, or merged into one that was."""
        return {id_ for id_ in self._target if self._current(id_) is None}

    @property
    def next_class_id(self) -> int:
        """Return the number of the next class that is added."""
        return max(self.class_ids, default=0) + 1

    def places(self) -> list[Place]:
        """Return the patches with a label, in the order of their first label."""
        return [place for place, by_annotator in self._labels.items() if any(by_annotator.values())]

    def annotators(self) -> list[str]:
        """Return the people who labeled patches, sorted."""
        return sorted({name for by in self._labels.values() for name, kept in by.items() if kept})

    def label(self, place: Place, annotator: str) -> Labeled | None:
        """Return an annotator's current label of a patch, or None."""
        kept = self._labels.get(place, {}).get(annotator)
        return label_of(kept[-1]) if kept else None

    def labels_of(self, annotator: str) -> list[Recorded]:
        """Return an annotator's labels that are not undone, in the order in which they were saved."""
        own = [number for number, (name, _) in self._order.items() if name == annotator]
        by_number = {one.number: one for by in self._labels.values() for one in by.get(annotator, ())}
        return [by_number[number] for number in own]

    def is_labeled(self, place: Place, annotator: str | None = None) -> bool:
        """Return whether anybody, or this annotator, has labeled a patch."""
        by_annotator = self._labels.get(place, {})
        return bool(by_annotator.get(annotator)) if annotator is not None else any(by_annotator.values())

    def answers(self, label: Labeled) -> dict[int, Answer]:
        """Return a label's answer for each current class.

        A merged class is present if any of its parts is, absent if all of them are, and otherwise unknown.
        """
        parts: dict[int, set[Answer]] = {id_: set() for id_ in self.classes}
        for id_, answer in label.answers.items():
            if (current := self._current(id_)) is not None:
                parts[current].add(answer)
        return {id_: _merged(answers) for id_, answers in parts.items()}

    def _current(self, id_: int) -> int | None:
        """Return the current class that a class is or is part of; None if it was removed."""
        current: int | None = id_
        while current in self._target:
            current = self._target[current]
        return current

    def verdict(self, place: Place) -> Verdict:
        """Return what the annotators of a patch say together: per class, the answer of most of them.

        On a tie, the answer is "unknown". The patch has a mark if at least half of the annotators marked it. Raises
        KeyError for a patch without a label.
        """
        latest = [label_of(kept[-1]) for kept in self._labels.get(place, {}).values() if kept]
        if not latest:
            raise KeyError(place)
        answered = [self.answers(one) for one in latest if one.mark == "none"]
        marks = [one.mark for one in latest if one.mark != "none"]
        if len(marks) >= len(answered):
            return Verdict(dict.fromkeys(self.classes, "unknown"), marks[-1], disputed=bool(answered))
        answers = {id_: _majority([one[id_] for one in answered]) for id_ in self.classes}
        contradicted = any({"present", "absent"} <= {one[id_] for one in answered} for id_ in self.classes)
        return Verdict(answers, "none", disputed=contradicted or bool(marks))

    def areas(self, place: Place) -> Areas:
        """Return the area of each current class in a patch, as its annotators outlined it together.

        Outlines of an annotator who found other classes in the patch than the `verdict` are left out. Raises KeyError
        for a patch without a label.
        """
        parts: dict[int, list[str]] = {id_: [] for id_ in self.classes}
        present = _present(self.verdict(place).answers)
        for one in (label_of(kept[-1]) for kept in self._labels.get(place, {}).values() if kept):
            if one.areas and _present(self.answers(one)) == present:
                for id_, text in one.areas.items():
                    if (current := self._current(id_)) is not None:
                        parts[current].append(text)
        return tuple(joined(found) for found in parts.values())

    def places_with(self, class_id: int) -> list[Place]:
        """Return the patches in which a current class is present by the current label of at least one annotator."""
        return [
            place
            for place, by_annotator in self._labels.items()
            if any(kept and class_id in _present(self.answers(label_of(kept[-1]))) for kept in by_annotator.values())
        ]

    def is_complete(self, label: Labeled) -> bool:
        """Return whether a label needs no second look: it has a mark, or an answer for every current class."""
        return label.mark != "none" or "unknown" not in self.answers(label).values()

    def is_blind(self, place: Place) -> bool:
        """Return whether a patch belongs to the random share that never shows a suggestion."""
        assert self.settings is not None
        return _fraction(f"blind {self.settings.seed} {place.id}") < self.settings.blind_share

    def is_sampled(self, place: Place) -> bool:
        """Return whether somebody labeled a patch of the blind share because it came at random.

        Imported patches were chosen by what they show. A label that completes an imported one does not change this.
        """
        labels = (label_of(one) for kept in self._labels.get(place, {}).values() for one in kept)
        return self.is_blind(place) and any(one.reason not in ("import", "correction", "again") for one in labels)

    def is_blind_turn(self, turn: int) -> bool:
        """Return whether an annotator's patch of this number is a blind one, if a model picks the others."""
        assert self.settings is not None
        return _fraction(f"turn {self.settings.seed} {turn}") < self.settings.blind_share


def label_of(record: Recorded) -> Labeled:
    """Return the label that an event is."""
    assert isinstance(record.event, Labeled)
    return record.event


def _present(answers: Mapping[int, Answer]) -> set[int]:
    return {id_ for id_, answer in answers.items() if answer == "present"}


def _merged(answers: set[Answer]) -> Answer:
    if "present" in answers:
        return "present"
    return "absent" if answers == {"absent"} else "unknown"


def _majority(answers: list[Answer]) -> Answer:
    present, absent = answers.count("present"), answers.count("absent")
    if present == absent:
        return "unknown"
    return "present" if present > absent else "absent"


def _fraction(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
