"""Everything that the page of wsi-label works with, opened together and closed in the right order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from pipeline.errors import LabelingError
from pipeline.labeling.dataset_files import DatasetWriter
from pipeline.labeling.events import FolderStarted, Place
from pipeline.labeling.folder import EVENTS_FILE, Wishes, prepare_folder
from pipeline.labeling.labels import Labels
from pipeline.labeling.patch_model import PatchModel
from pipeline.labeling.picks import Picks
from pipeline.labeling.session import Session
from pipeline.labeling.similar import SimilarPatches
from pipeline.labeling.slides import SlideFile, Slides
from pipeline.labeling.store import EventStore


@dataclass(frozen=True)
class Desk:
    """What the page works with."""

    session: Session
    slides: Slides
    similar: SimilarPatches
    model: PatchModel | None
    """Makes suggestions; None if no model was given."""
    title: str


@contextmanager
def open_desk(
    folder: Path,
    files: Sequence[SlideFile],
    annotator: str,
    *,
    wishes: Wishes,
    classes: Sequence[str],
    model: Bundle | None,
    shipped: Bundle,
) -> Iterator[Desk]:
    """Open a labels folder, which is made if it does not exist, and its slides. At the end, write the data set.

    `classes` are added to those of the folder. `model` makes suggestions. Patches are compared by its features, or by
    those of the `shipped` model, which also gives a new folder its pixel size and side.

    Raises LabelingError if the folder, a setting or a class cannot be used.
    """
    card = (model or shipped).card
    with ExitStack() as stack:
        store = stack.enter_context(EventStore(folder / EVENTS_FILE))
        known = {one.name: one for one in card.classes} if model else {}
        settings = prepare_folder(store, annotator, wishes, card, classes, known)
        if model is not None:
            check_model(model, settings)
        slides = Slides(files, settings, list(Labels(store.read()).slides.values()))
        stack.callback(slides.close)
        seeing = PatchModel(model or shipped)
        similar = SimilarPatches(lambda places: seeing.see(slides.pixels(places)).features_NF)
        session = Session(store, slides, annotator, seeing.digest)
        writer = DatasetWriter(folder, store, lambda place: _pixels(slides, place))
        stack.callback(writer.close)
        picks = Picks(session, similar)
        stack.callback(picks.close)
        # Before the picks, which may wait for features.
        stack.callback(similar.close)

        def changed() -> None:
            writer.changed()
            picks.changed()

        session.saved, session.picks = changed, picks.best
        # A session that was killed may have left labels without pictures, and labels to pick by.
        slides.when_opened(changed)
        yield Desk(session, slides, similar, seeing if model else None, folder.absolute().name)


def check_model(model: Bundle, settings: FolderStarted) -> None:
    """Raise LabelingError if a model expects other patches than those of the folder."""
    card = model.card
    if (card.mpp, card.gate_window) != (settings.mpp, settings.side):
        raise LabelingError(
            f"model {card.name} expects patches of {card.gate_window} px of {card.mpp:g} µm, but those of this folder "
            f"have {settings.side} px of {settings.mpp:g} µm; omit --model, or pass another folder with --output"
        )


def _pixels(slides: Slides, place: Place) -> NDArray[np.uint8] | None:
    ready = slides.of(place)
    if ready is None:
        return None
    with slides.reading(ready):
        return ready.patches.pixels(place)
