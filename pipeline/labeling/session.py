"""One annotator's session: which patches come next, and what is saved.

Every method may be called from any thread. A method that returns after saving has the events on the disk.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pipeline.errors import LabelingError
from pipeline.labeling.counts import Counts, count
from pipeline.labeling.events import Answer, Event, Labeled, Mark, Place, Reason, Recorded, SlideAdded, Undone, View
from pipeline.labeling.labels import LabelClass, Labels, Verdict, label_of
from pipeline.labeling.recent import Recent
from pipeline.labeling.slides import Slides
from pipeline.labeling.store import EventStore

AHEAD = 6
"""Patches that the page knows in advance, so that it can fetch their pictures."""

HISTORY = 50
"""Own labels to which the page can go back."""

REMEMBERED = 1000
"""Orders, and undos, that are recognized if a page sends them again. A page repeats only its latest one, so this is
enough for as many tabs."""


@dataclass(frozen=True)
class Patch:
    """A patch to show."""

    place: Place
    reason: Reason
    blind: bool
    label: Labeled | None = None
    """The annotator's own label with an answer for each current class, if there is one."""


@dataclass(frozen=True)
class NewLabel:
    """A label that a person made."""

    place: Place
    answers: Mapping[int, Answer]
    """Answer for the number of each class that the page showed."""
    mark: Mark
    view: View
    seconds: float | None
    suggested: dict[int, float] | None = None


@dataclass(frozen=True)
class _Order:
    """What the page asked to save together, so that it is not saved twice."""

    content: list[tuple[Place, Mapping[int, Answer], Mark]]
    numbers: tuple[int, ...]
    """Event numbers of the labels, also of those that were saved before a person changed them."""


class Session:
    """What one annotator does with a labels folder."""

    def __init__(self, store: EventStore, slides: Slides, annotator: str, model: str | None = None) -> None:
        """`model` is the digest of the model that makes suggestions, and by whose features patches are picked."""
        self._store = store
        self._slides = slides
        self._model = model
        self._lock = threading.RLock()
        records = store.read()
        self._labels = Labels(records)
        self._excluded: list[Place] = []
        # These patches stay next, whatever is picked meanwhile: the page may already show one of them.
        self._queue: dict[Place, Reason] = {}
        self._actions: list[tuple[int, ...]] = []
        self._undone: Recent[tuple[int, ...], dict[Place, Reason]] = Recent(REMEMBERED)
        self._orders: Recent[str, _Order] = Recent(REMEMBERED)
        self._handed: dict[str, Place] = {}
        self._remembered: set[str] = set()
        self._registered: set[SlideAdded] = set(self._labels.slides.values())
        self.annotator = annotator
        started = records[0].time if records else ""
        self.id = hashlib.sha256(f"{started} {annotator}".encode()).hexdigest()[:16]
        """Names the folder and the annotator: the same in each session of both, and different in all others."""
        self.saved: Callable[[], None] = lambda: None
        """Called after events were saved."""
        self.picks: Callable[[], Sequence[Place]] = lambda: ()
        """Returns patches that come before those of the random order."""

    def classes(self) -> list[LabelClass]:
        """Return the current classes."""
        with self._lock:
            self._follow()
            return list(self._labels.classes.values())

    def place(self, patch_id: str) -> Place | None:
        """Return a patch by its id. A page can outlive the session that handed the patch out."""
        with self._lock:
            if patch_id not in self._handed:
                self._remember_open()
            return self._handed.get(patch_id)

    def _remember_open(self) -> None:
        """Remember the ids of all patches of the slides that are open now."""
        open_ = {ready.added.digest: ready for ready in self._slides.ready()}
        for digest in open_.keys() - self._remembered:
            self._handed.update((place.id, place) for place in open_[digest].order)
            self._remembered.add(digest)
        # Imported patches may lie beside the tissue.
        self._handed.update((place.id, place) for place in self._labels.places() if place.slide in open_)

    def patch(self, place: Place, reason: Reason) -> Patch:
        """Return a patch to show, and remember its id."""
        with self._lock:
            self._handed[place.id] = place
            label = self._labels.label(place, self.annotator)
            if label is not None:
                label = label.model_copy(update={"answers": self._labels.answers(label)})
            return Patch(place, reason, self._labels.is_blind(place), label)

    def upcoming(self, count: int = AHEAD) -> list[Patch]:
        """Return the next patches to label. Waits for a slide only if the open ones have no patch left."""
        # Before any slide is open, an incomplete patch would not come first.
        self._slides.wait()
        with self._lock:
            self._follow()
            next_: dict[Place, Reason] = dict.fromkeys(filter(self._is_open, self._excluded), "excluded")
            next_ |= dict.fromkeys(self._incomplete(), "again")
            next_ |= {place: reason for place, reason in self._open_queue().items() if place not in next_}
        # Waiting for a slide must not block other requests.
        for found in self._candidates():
            if len(next_) >= count or (found is None and next_):
                break
            if found is not None and found[0] not in next_:
                place, reason = found
                with self._lock:
                    self._queue[place] = next_[place] = reason
        return [self.patch(place, reason) for place, reason in islice(next_.items(), count)]

    def _open_queue(self) -> dict[Place, Reason]:
        """Return the patches of the queue to label. A label that is undone brings its patch back to its old place."""
        return {place: reason for place, reason in self._queue.items() if self._is_open(place)}

    def _incomplete(self) -> list[Place]:
        """Return the patches whose label by this annotator lacks an answer."""
        places = (label_of(one).place for one in self._labels.labels_of(self.annotator))
        current = {place: self._labels.label(place, self.annotator) for place in places}
        return [
            place
            for place, own in current.items()
            if own is not None and not self._labels.is_complete(own) and self._slides.of(place) is not None
        ]

    def _candidates(self) -> Iterator[tuple[Place, Reason] | None]:
        """Yield the picks, with blind patches at random turns among them, and then all patches in the random order.

        Yields None before it waits for a slide. Patches can come twice.
        """
        with self._lock:
            turn = len(self._open_queue()) + len(self._labels.labels_of(self.annotator))
            picks = [place for place in self.picks() if self._is_open(place) and place not in self._queue]
            queued = set(self._queue)
        ordered = self._open(self._slides.open_places())
        blind = (found for found in ordered if found[1] == "blind" and found[0] not in queued)
        while picks:
            # At a blind turn, the pick waits for the next turn.
            next_blind = next(blind, None) if self._labels.is_blind_turn(turn) else None
            yield next_blind or (picks.pop(0), "uncertain")
            turn += 1
        while True:
            opened = self._slides.opened()
            yield from self._open(self._slides.open_places())
            if opened == self._slides.count:
                return
            yield None
            self._slides.wait_for_more(opened)

    def _open(self, places: Iterable[Place]) -> Iterator[tuple[Place, Reason]]:
        """Yield the patches among these that this annotator should label."""
        for place in places:
            with self._lock:
                open_, blind = self._is_open(place), self._labels.is_blind(place)
            if open_:
                yield place, "blind" if blind else "random"

    def _is_open(self, place: Place) -> bool:
        """Return whether this annotator should label a patch. Everybody labels the blind share."""
        if self._labels.is_labeled(place, self.annotator):
            return False
        return self._labels.is_blind(place) or not self._labels.is_labeled(place)

    def unseen(self) -> Iterator[Place]:
        """Yield the patches that may be in a grid: not labeled, not blind, and on a slide that is open."""
        for place in self._slides.open_places():
            with self._lock:
                fit = not self._labels.is_blind(place) and not self._labels.is_labeled(place)
            if fit:
                yield place

    def verdicts(self) -> dict[Place, Verdict]:
        """Return what all annotators say about the labeled patches of open slides."""
        with self._lock:
            self._follow()
            places = [place for place in self._labels.places() if self._slides.of(place) is not None]
            return {place: self._labels.verdict(place) for place in places}

    def answered(self, class_id: int) -> dict[Answer, list[Place]]:
        """Return the labeled patches of open slides by their answer for a class."""
        found: dict[Answer, list[Place]] = {"present": [], "absent": [], "unknown": []}
        for place, verdict in self.verdicts().items():
            found[verdict.answers[class_id]].append(place)
        return found

    def history(self) -> list[Patch]:
        """Return the annotator's latest labeled patches that can be shown, the latest first."""
        with self._lock:
            self._follow()
            places = dict.fromkeys(label_of(one).place for one in reversed(self._labels.labels_of(self.annotator)))
            shown = (place for place in places if self._slides.of(place) is not None)
            labels = self._labels
            return [self.patch(p, _reason(labels.label(p, self.annotator))) for p in islice(shown, HISTORY)]

    def save(
        self, labels: Sequence[NewLabel], reasons: dict[Place, Reason], order: str = "", *, again: bool = False
    ) -> None:
        """Save labels together. Raises LabelingError if they cannot be saved, or name a class that does not exist.

        A class that was removed while the page showed it may be absent, but not present.

        The page sends an `order` `again` if the answer was lost: the same labels are then saved once. If a person has
        changed them in between, they are saved, and one undo takes back both. If another tab has undone them in
        between, they are saved again.

        If a session that has ended has saved them, they are recognized by their content. If a person has changed some
        of them, these are saved, and one undo takes back the new versions only: the file does not contain orders.
        """
        content = [(one.place, one.answers, one.mark) for one in labels]
        with self._lock:
            self._follow()
            before = self._orders.get(order)
            if before is not None and not self._own_numbers().issuperset(before.numbers):
                before = None
            elif before is None and again:
                labels = self._unsaved(labels)
            if not labels or (before is not None and before.content == content):
                return
            for one in labels:
                present = {id_ for id_, answer in one.answers.items() if answer == "present"}
                if strange := one.answers.keys() - self._labels.class_ids | present & self._labels.removed_ids:
                    raise LabelingError(f"class {min(strange)} does not exist; reload the page")
            added = [ready.added for ready in self._slides.ready() if ready.added not in self._registered]
            events: list[Event] = [*added, *(self._event(one, reasons.get(one.place, "random")) for one in labels)]
            numbers = self._store.append(self.annotator, events)
            self._registered.update(added)
            action = numbers[len(added) :]
            if before is not None:
                self._actions = [one for one in self._actions if one != before.numbers]
                action = (*before.numbers, *action)
            self._actions.append(action)
            if order:
                self._orders.put(order, _Order(content, action))
            done = {one.place for one in labels}
            self._excluded = [place for place in self._excluded if place not in done]
            self._follow()
        self.saved()

    def _unsaved(self, labels: Sequence[NewLabel]) -> list[NewLabel]:
        """Return the labels that the annotator has not saved yet."""
        saved: dict[Place, list[Labeled]] = {}
        for record in self._labels.labels_of(self.annotator):
            own = label_of(record)
            saved.setdefault(own.place, []).append(own)

        def is_saved(new: NewLabel) -> bool:
            event = self._event(new, "random")
            same = [own for own in saved.get(new.place, []) if (own.answers, own.mark) == (event.answers, event.mark)]
            # A person may give the answer of an older label again, but hardly after the same time.
            return any(own is saved[new.place][-1] or own.seconds == event.seconds for own in same)

        return [one for one in labels if not is_saved(one)]

    def _event(self, new: NewLabel, reason: Reason) -> Labeled:
        return Labeled(
            place=new.place,
            answers=dict(new.answers) if new.mark == "none" else {},
            mark=new.mark,
            view=new.view,
            reason=reason,
            suggested=new.suggested,
            model=self._model if new.suggested is not None or reason in ("similar", "uncertain") else None,
            seconds=None if new.seconds is None else round(min(new.seconds, 86_400.0), 2),
        )

    def exclude(self, places: Sequence[Place]) -> None:
        """Show these patches next in the single view."""
        with self._lock:
            self._excluded = list(dict.fromkeys([*places, *self._excluded]))

    def last(self) -> tuple[int, ...]:
        """Return the event numbers of the labels that `undo` is about; empty if there are none."""
        with self._lock:
            return self._last(self._open_own())

    def undo(self) -> list[Patch]:
        """Undo the annotator's latest label, or grid of labels, and return its patches; empty if there is none.

        The first undo of a session can reach the last label, or grid, of the session before. Imported labels are kept,
        and so are labels of slides that are not open, because the page could not show what was undone. Raises
        LabelingError if the undo cannot be saved.
        """
        return self._undo(None) or []

    def undo_only(self, numbers: tuple[int, ...]) -> list[Patch] | None:
        """Do the same if `last` returns these numbers. Otherwise, return None and undo nothing.

        The page sends an undo again if the answer was lost: labels that are already undone are not undone again, and
        their patches are returned.
        """
        return self._undo(numbers)

    def _undo(self, wanted: tuple[int, ...] | None) -> list[Patch] | None:
        with self._lock:
            own = self._open_own()
            numbers = self._last(own)
            if wanted is not None and wanted != numbers:
                before = self._undone.get(wanted)
                return None if before is None else [self.patch(place, reason) for place, reason in before.items()]
            if not numbers:
                return []
            self._store.append(self.annotator, [Undone(numbers=numbers)])
            # Only now: if the undo cannot be saved, the next one is about the same labels.
            del self._actions[-1:]
            labels = [label_of(own[number]) for number in numbers if number in own]
            undone = {one.place: _reason(one) for one in labels}
            self._undone.put(numbers, undone)
            self._follow()
            self._excluded = [place for place in self._excluded if place not in undone]
            patches = [self.patch(place, reason) for place, reason in undone.items()]
        self.saved()
        return patches

    def _open_own(self) -> dict[int, Recorded]:
        """Return the annotator's labels on open slides by number, in the order in which they were saved."""
        self._follow()
        open_ = {ready.added.digest for ready in self._slides.ready()}
        own = self._labels.labels_of(self.annotator)
        return {one.number: one for one in own if label_of(one).place.slide in open_}

    def _own_numbers(self) -> set[int]:
        return {one.number for one in self._labels.labels_of(self.annotator)}

    def _last(self, own: Mapping[int, Recorded]) -> tuple[int, ...]:
        while self._actions and not own.keys() & set(self._actions[-1]):
            self._actions.pop()
        if self._actions:
            return self._actions[-1]
        made = [one for one in own.values() if label_of(one).view != "import"]
        # The labels of a grid are saved at the same time.
        return tuple(one.number for one in made if one.time == made[-1].time)

    def counts(self) -> Counts:
        """Return how many patches are labeled."""
        with self._lock:
            self._follow()
            return count(self._labels)

    def median_seconds(self) -> float | None:
        """Return the median time that this annotator took per label; None without labels."""
        with self._lock:
            times = [label_of(one).seconds for one in self._labels.labels_of(self.annotator)]
        known = [seconds for seconds in times if seconds is not None]
        return statistics.median(known) if known else None

    def _follow(self) -> None:
        """Add the events that this or another process saved since the last call."""
        for record in self._store.read(after=self._labels.number):
            self._labels.apply(record)


def _reason(label: Labeled | None) -> Reason:
    return "random" if label is None else label.reason
