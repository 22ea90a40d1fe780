"""Write the labels that annotations stand for into a labels folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.tissue_class import TissueClass
from pipeline.errors import LabelingError
from pipeline.labeling.dataset_files import write_dataset
from pipeline.labeling.events import Answer, Event, FolderStarted, Labeled, Mark, Recorded, SlideAdded, Undone
from pipeline.labeling.folder import EVENTS_FILE, Wishes, prepare_folder
from pipeline.labeling.import_annotations import (
    Drawing,
    Imported,
    ImportSource,
    count_outside,
    import_events,
    joined_drawings,
    labels_from,
    outdated,
    superseded,
    target_name,
    used_names,
)
from pipeline.labeling.labels import Labels, label_of
from pipeline.labeling.patches import SlidePatches
from pipeline.labeling.slides import SlideFile
from pipeline.labeling.store import EventStore
from wsi.slide import open_slide, slide_digest, slide_stamp


@dataclass(frozen=True)
class ImportFolder:
    """A labels folder that annotations are imported into."""

    path: Path
    store: EventStore
    settings: FolderStarted
    annotator: str


@contextmanager
def open_import(
    path: Path, annotator: str, wishes: Wishes, names: Sequence[str], known: Mapping[str, TissueClass]
) -> Iterator[ImportFolder]:
    """Open a labels folder, which is made if it does not exist, and add the classes that it lacks.

    `known` classes, by name, give added ones their color and role.

    Raises LabelingError if there are fewer than two classes, or if a setting or a class cannot be used.
    """
    card = load_bundle(DEFAULT_BUNDLE).card
    with EventStore(path / EVENTS_FILE) as store:
        yield ImportFolder(path, store, prepare_folder(store, annotator, wishes, card, names, known), annotator)


def names_of(drawings: Sequence[Drawing], mapping: Mapping[str, str]) -> list[str]:
    """Return the classes that drawings need, each once."""
    return list(dict.fromkeys(name for one in drawings for name in used_names(one.annotations, mapping)))


def known_classes(classes: Sequence[TissueClass], mapping: Mapping[str, str]) -> dict[str, TissueClass]:
    """Return the classes of corrected results by the names that they get in a labels folder.

    If several classes get one name, the class that has this name already counts. If none has it, the name is left out.
    """
    found: dict[str, list[TissueClass]] = {}
    for one in {one.name: one for one in classes}.values():
        found.setdefault(mapping.get(one.name, one.name), []).append(one)
    owners = {name: next((one for one in alike if one.name == name), None) for name, alike in found.items()}
    return {name: owners[name] or alike[0] for name, alike in found.items() if owners[name] or len(alike) == 1}


def check_names(names: Sequence[str], sources: Sequence[ImportSource], mapping: Mapping[str, str]) -> None:
    """Raise LabelingError if `sources` do not have the two classes that a new labels folder needs."""
    if len(set(names)) >= 2:
        return
    annotations = [one for source in sources for drawing in source.drawings for one in drawing.annotations]
    skipped = Counter({"of a class that QuPath ignores": sum(target_name(one, mapping) is None for one in annotations)})
    for source in sources:
        skipped.update(source.skipped)
    left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.items() if number)
    left_out = f" (objects left out: {left_out})" if left_out else ""
    if not names and not annotations:
        raise LabelingError(
            f"{', '.join(one.name for one in sources)}: no annotations with a class{left_out}; in QuPath, assign "
            "classes to the annotations and export them again with File > Export objects as GeoJSON"
        )
    raise LabelingError(
        "a new labels folder needs at least two classes, but the annotations have "
        + (f"only {names[0]}" if names else "none")
        + left_out
        + "; pass --map for classes that QuPath ignores, such as --map 'Ignore*=other', or create the folder first "
        "with wsi-label SLIDES -o FOLDER --classes tumor,other"
    )


def import_drawings(
    folder: ImportFolder,
    file: SlideFile,
    drawings: Sequence[Drawing],
    mapping: Mapping[str, str],
    *,
    partial: bool,
    digest: str | None = None,
) -> Imported:
    """Add the labels of one slide's annotations, and write the data set. `digest` is that of the right slide, if known.

    All drawings of an annotator become one label per patch, so pass them together. Labels of an earlier import of the
    same files that the drawings no longer show are undone.

    Raises SlideError if the slide cannot be used, and LabelingError if it is another slide or the labels cannot be
    saved.
    """
    found_digest = slide_digest(file.path)
    if digest is not None and found_digest != digest:
        raise LabelingError(
            f"{file.path}: is not the slide that was segmented: its bytes differ; pass the right one with --slide"
        )
    known = Labels(folder.store.read()).slides.get(found_digest)
    added = file.added(found_digest, slide_stamp(file.path), known)
    with open_slide(file.path, file.mpp) as slide:
        patches = SlidePatches(slide, found_digest, folder.settings.mpp, folder.settings.side)
        done = [
            _import(folder, patches, added, drawing, mapping, partial=partial) for drawing in joined_drawings(drawings)
        ]
        write_dataset(
            folder.path,
            Labels(folder.store.read()),
            lambda place: patches.pixels(place) if place.slide == found_digest else None,
        )
    sums = [sum(part) for part in zip(*map(astuple, done), strict=True)]
    return Imported(*sums) if done else Imported(0, 0, 0, 0, 0, 0)


def _import(
    folder: ImportFolder,
    patches: SlidePatches,
    added: SlideAdded,
    drawing: Drawing,
    mapping: Mapping[str, str],
    *,
    partial: bool,
) -> Imported:
    labels = Labels(folder.store.read())
    ids = {one.name: one.id for one in labels.classes.values()}
    found, ignored = labels_from(patches, drawing, mapping, ids)
    old = outdated(labels, added, drawing, found, partial=partial)
    before = {place: labels.label(place, drawing.annotator) for place in (label_of(one).place for one in old)}
    events: list[Event] = []

    def add(new: Sequence[Event]) -> None:
        for event in new:
            labels.apply(Recorded(labels.number + 1, "", drawing.annotator, event))
        events.extend(new)

    def undo(records: Sequence[Recorded]) -> None:
        if records:
            add([Undone(numbers=tuple(one.number for one in records))])

    undo(old)
    new, kept = import_events(labels, drawing.annotator, added, found, partial=partial)
    add(new)
    undo(superseded(labels, drawing, found))
    folder.store.append(drawing.annotator, events)
    after = {place: labels.label(place, drawing.annotator) for place in before}
    taken_back = sum(_answers(labels, before[place]) != _answers(labels, after[place]) for place in before)
    incomplete = sum("unknown" in one.answers.values() for one in found)
    outside = count_outside(drawing.annotations, patches.size_l0)
    return Imported(len(found) - incomplete, incomplete, ignored, kept, taken_back, outside)


def _answers(labels: Labels, label: Labeled | None) -> tuple[Mark, dict[int, Answer]] | None:
    return None if label is None else (label.mark, labels.answers(label))
