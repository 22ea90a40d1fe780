"""Write the labels that annotations stand for into a labels folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.bundle import DEFAULT_BUNDLE, load_bundle
from pipeline.labeling.annotations import Annotations
from pipeline.labeling.dataset_files import write_dataset
from pipeline.labeling.events import FolderStarted, SlideAdded
from pipeline.labeling.folder import EVENTS_FILE, Wishes, prepare_folder
from pipeline.labeling.import_annotations import Imported, drawn, import_events, labels_from, used_names
from pipeline.labeling.labels import Labels
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
    path: Path, annotator: str, wishes: Wishes, annotations: Sequence[Annotations], mapping: Mapping[str, str]
) -> Iterator[ImportFolder]:
    """Open a labels folder, which is made if it does not exist, and add the classes of annotations that it lacks.

    Raises LabelingError if there are fewer than two classes, or if a setting or a class cannot be used.
    """
    names = list(dict.fromkeys(name for one in annotations for name in used_names(one.found, mapping)))
    card = load_bundle(DEFAULT_BUNDLE).card
    with EventStore(path / EVENTS_FILE) as store:
        yield ImportFolder(path, store, prepare_folder(store, annotator, wishes, card, names, {}), annotator)


def import_file(
    folder: ImportFolder, file: SlideFile, annotations: Annotations, mapping: Mapping[str, str], *, partial: bool
) -> Imported:
    """Add the labels of one slide's annotations, and write the data set.

    Raises SlideError if the slide cannot be used, and LabelingError if the labels cannot be saved.
    """
    labels = Labels(folder.store.read())
    ids = {one.name: one.id for one in labels.classes.values()}
    digest = slide_digest(file.path)
    added = SlideAdded(digest=digest, stamp=slide_stamp(file.path), name=file.path.name, patient=file.patient)
    with open_slide(file.path, file.mpp) as slide:
        patches = SlidePatches(slide, digest, folder.settings.mpp, folder.settings.side)
        found, ignored = labels_from(patches, drawn(annotations.found, mapping, ids), list(ids.values()))
        events, kept = import_events(labels, folder.annotator, added, found, partial=partial)
        folder.store.append(folder.annotator, events)
        write_dataset(
            folder.path,
            Labels(folder.store.read()),
            lambda place: patches.pixels(place) if place.slide == digest else None,
        )
    incomplete = sum("unknown" in one.answers.values() for one in found)
    return Imported(len(found) - incomplete, incomplete, ignored, kept)
