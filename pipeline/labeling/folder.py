"""A labels folder: its settings and its classes, as they are first chosen and later changed.

labels/
    labels.sqlite    the events, from which all other files are made
    patches/         the patches of the data set
    left-out/        labeled patches that are not part of it: unsure, artifacts, incomplete, undone
    labels.csv       one row per patch of the data set
    dataset.toml     the description that wsi-train reads
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from models.card import ModelCard
from models.tissue_class import Color, TissueClass
from pipeline.errors import LabelingError
from pipeline.files import is_file
from pipeline.labeling.events import (
    ClassAdded,
    ClassesMerged,
    ClassRemoved,
    ClassRenamed,
    Event,
    FolderStarted,
    Recorded,
)
from pipeline.labeling.labels import Labels
from pipeline.labeling.store import EventStore
from pipeline.training.palettes import CLASS_COLORS

EVENTS_FILE = "labels.sqlite"

DEFAULT_SEED = 1
DEFAULT_BLIND_SHARE = 0.1


@dataclass(frozen=True)
class Wishes:
    """The settings that a user asks for; None stands for those of the folder, or for the defaults of a new one."""

    mpp: float | None = None
    side: int | None = None
    seed: int | None = None
    blind_share: float | None = None


def open_events(folder: Path) -> EventStore:
    """Return the events of an existing labels folder. Raises LabelingError if there are none."""
    if not is_file(folder / EVENTS_FILE):
        raise LabelingError(f"{folder}: has no {EVENTS_FILE}; pass the folder that wsi-label wrote with --output")
    return EventStore(folder / EVENTS_FILE)


def has_classes(folder: Path) -> bool:
    """Return whether a folder is a labels folder with classes. A start that failed can leave one without any."""
    if not is_file(folder / EVENTS_FILE):
        return False
    with open_events(folder) as store:
        return bool(Labels(store.read()).classes)


def prepare_folder(
    store: EventStore,
    annotator: str,
    wishes: Wishes,
    card: ModelCard,
    names: Sequence[str],
    known: Mapping[str, TissueClass],
) -> FolderStarted:
    """Start a folder or check its settings, and add the classes that it lacks. Return the settings.

    `known` classes, by name, give added ones their color and role. A new folder gets pixel size and side from `card`
    unless `wishes` has them. Raises LabelingError if the folder would have fewer than two classes, or if a setting or a
    class cannot be used.
    """
    check_classes([*(one.name for one in Labels(store.read()).classes.values()), *names])
    defaults = Wishes(card.mpp, card.gate_window, DEFAULT_SEED, DEFAULT_BLIND_SHARE)
    settings = start_folder(store, annotator, wishes, defaults)
    add_classes(store, annotator, names, known)
    return settings


def start_folder(store: EventStore, annotator: str, wishes: Wishes, defaults: Wishes) -> FolderStarted:
    """Return the settings of a folder, which a new folder gets from `wishes` and then `defaults`.

    Raises LabelingError if a wish differs from the settings of an existing folder, because all patches share them, or
    if a value is out of range.
    """

    def started(before: Sequence[Recorded]) -> list[Event]:
        if Labels(before).settings is not None:
            return []
        values = {name: _first(value, getattr(defaults, name)) for name, value in vars(wishes).items()}
        try:
            return [FolderStarted.model_validate(values)]
        except ValidationError as error:
            first = error.errors()[0]
            raise LabelingError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error

    store.append_decided(annotator, started)
    settings = Labels(store.read()).settings
    assert settings is not None  # saved now or before
    for name, wish in vars(wishes).items():
        if wish is not None and wish != getattr(settings, name):
            raise LabelingError(
                f"the patches of this folder have {name} {getattr(settings, name)}, not {wish}; omit the option, or "
                "pass another folder with --output"
            )
    return settings


def _first(value: float | None, default: float | None) -> float | None:
    return default if value is None else value


def add_classes(store: EventStore, annotator: str, names: Sequence[str], known: Mapping[str, TissueClass]) -> None:
    """Add the classes that the folder does not have yet. `known` classes, by name, give them their color and role.

    Raises LabelingError for a name that is not valid.
    """

    def added(before: Sequence[Recorded]) -> list[Event]:
        labels = Labels(before)
        new = [name for name in dict.fromkeys(names) if name not in _names(labels)]
        try:
            made = [
                (id_, name, known.get(name) or TissueClass(name, class_color(id_ - 1)))
                for id_, name in enumerate(new, start=labels.next_class_id)
            ]
            return [ClassAdded(id=id_, name=name, color=one.color, role=one.role) for id_, name, one in made]
        except ValidationError as error:
            raise LabelingError(f"--classes: {error.errors()[0]['msg']}; separate the names by commas") from error

    store.append_decided(annotator, added)


def check_classes(names: Sequence[str]) -> None:
    """Raise LabelingError if these are fewer than the two classes that a model needs."""
    if len(set(names)) < 2:
        raise LabelingError(
            "a model needs at least two classes: pass --classes with names that are separated by commas, such as "
            "tumor,other"
        )


def rename_class(store: EventStore, annotator: str, old: str, new: str) -> None:
    """Give a class another name. Raises LabelingError if `old` does not exist, or `new` does or is not valid."""

    def renamed(before: Sequence[Recorded]) -> list[Event]:
        labels = Labels(before)
        if new in _names(labels):
            raise LabelingError(f"class {new} already exists; to join the two, merge {old} into {new}")
        try:
            return [ClassRenamed(id=class_id(labels, old), name=new)]
        except ValidationError as error:
            raise LabelingError(error.errors()[0]["msg"]) from error

    store.append_decided(annotator, renamed)


def merge_classes(store: EventStore, annotator: str, old: str, into: str) -> None:
    """Make a class a part of another one.

    Raises LabelingError if one does not exist, if they are the same, or if there are only two classes.
    """

    def merged(before: Sequence[Recorded]) -> list[Event]:
        labels = Labels(before)
        event = ClassesMerged(id=class_id(labels, old), into=class_id(labels, into))
        if event.id == event.into:
            raise LabelingError(f"class {old} cannot be merged into itself")
        _check_enough_are_left(labels, f"class {old} cannot be merged into {into}")
        return [event]

    store.append_decided(annotator, merged)


def remove_class(store: EventStore, annotator: str, name: str) -> None:
    """Remove a class.

    Raises LabelingError if it does not exist, if it is present in a patch, or if there are only two classes.
    """

    def removed(before: Sequence[Recorded]) -> list[Event]:
        labels = Labels(before)
        event = ClassRemoved(id=class_id(labels, name))
        if found := labels.places_with(event.id):
            raise LabelingError(
                f"class {name} cannot be removed, because patches show it ({len(found)}); merge it into another "
                "class with --merge, or label these patches again"
            )
        _check_enough_are_left(labels, f"class {name} cannot be removed")
        return [event]

    store.append_decided(annotator, removed)


def _check_enough_are_left(labels: Labels, problem: str) -> None:
    """Raise LabelingError if there is not one class more than a model needs."""
    if len(labels.classes) <= 2:
        raise LabelingError(f"{problem}, because a model needs at least two classes; add a class with --add first")


def class_id(labels: Labels, name: str) -> int:
    """Return the number of a class. Raises LabelingError if it does not exist."""
    for one in labels.classes.values():
        if one.name == name:
            return one.id
    raise LabelingError(f"class {name} does not exist; the classes are {', '.join(_names(labels)) or 'none'}")


def _names(labels: Labels) -> list[str]:
    return [one.name for one in labels.classes.values()]


def class_color(index: int) -> Color:
    """Return the color of the class with this index: from the palette, and then by turning the hue."""
    if index < len(CLASS_COLORS):
        return CLASS_COLORS[index]
    # The golden ratio spreads any number of hues evenly.
    red, green, blue = colorsys.hsv_to_rgb(index * 0.6180339887 % 1, 0.75, 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)
