"""The events of a labels folder: what happened, in the order in which it happened. No event is ever changed.

Places use level-0 pixels from the corner of the slide's bounds, as in QuPath.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer

from models.tissue_class import ClassName, Color, Role
from pipeline.files import printable_name
from pipeline.labeling.event_file import Entry, EventModel
from pipeline.labeling.masks import checked_area

Answer = Literal["present", "absent", "unknown"]
"""What is known of a class in a patch."""

Mark = Literal["none", "unsure", "artifact"]
"""A patch with a mark is not used for training."""

View = Literal["single", "grid", "import"]
"""Where a label was made. In the grid, one answer covers many patches."""

Reason = Literal["random", "blind", "uncertain", "similar", "excluded", "again", "import", "correction"]
"""Why a patch was picked: the random order, the blind share, an uncertain answer of the light model, similarity to
labeled patches, excluded from a grid, a label without an answer for every class, drawn in QuPath, or the map of a model
was corrected there."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]

Name = Annotated[str, AfterValidator(printable_name)]
"""Part of a file name. Bytes that are not UTF-8 are escaped, as in the names of results: JSON cannot store them."""


@pydantic.dataclasses.dataclass(frozen=True)
class Place:
    """A square patch of a slide."""

    slide: str
    """Digest of the slide's file."""
    x_l0: float
    y_l0: float
    side: int
    """Side in pixels of `mpp` micrometers."""
    mpp: float

    @property
    def id(self) -> str:
        """Return a short digest: the name of the patch in addresses and files."""
        text = f"{self.slide} {self.x_l0!r} {self.y_l0!r} {self.side} {self.mpp!r}"
        return hashlib.sha256(text.encode()).hexdigest()[:20]


class FolderStarted(EventModel):
    """The first event of a folder: what all its patches share."""

    kind: Literal["folder"] = "folder"
    mpp: Positive
    side: Annotated[int, Field(ge=32, le=4096)]
    seed: int
    blind_share: Annotated[float, Field(ge=0, lt=1)]
    """Share of the patches that never show a suggestion and that every annotator labels."""


class SlideAdded(EventModel):
    """A slide was opened for labeling. Its latest event counts."""

    kind: Literal["slide"] = "slide"
    digest: str
    stamp: str
    """`wsi.slide.slide_stamp`: as long as the file has it, the digest need not be computed again."""
    name: Name
    patient: Name
    """Patches of a patient stay in one split."""


class ClassAdded(EventModel):
    """A class was added. Patches labeled before have the answer "unknown" for it."""

    kind: Literal["class"] = "class"
    id: int
    """Number of the class, which never changes."""
    name: ClassName
    color: Color
    role: Role = "tissue"

    @model_serializer(mode="wrap")
    def _as_json(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Earlier versions have no role and refuse unknown keys.
        return {key: value for key, value in content(self).items() if (key, value) != ("role", "tissue")}


class ClassRenamed(EventModel):
    """A class got another name. Its labels stay."""

    kind: Literal["rename"] = "rename"
    id: int
    name: ClassName


class ClassesMerged(EventModel):
    """A class became part of another one, which is present wherever either was."""

    kind: Literal["merge"] = "merge"
    id: int
    into: int


class ClassRemoved(EventModel):
    """A class was removed, and with it the classes that are part of it. Answers for it do not count."""

    kind: Literal["remove"] = "remove"
    id: int


class Labeled(EventModel):
    """A person labeled a patch. The latest label of an annotator that is not undone counts."""

    kind: Literal["label"] = "label"
    place: Place
    answers: dict[int, Answer]
    """Answer for each class number. A class that is missing is unknown."""
    mark: Mark = "none"
    source: Literal["person", "qupath", "viewer"] = "person"
    """The page of wsi-label, annotations of QuPath, or corrections in wsi-view."""
    view: View
    reason: Reason
    suggested: dict[int, float] | None = None
    """Probabilities that were shown before the answer; None if no suggestion was shown."""
    model: str | None = None
    """Digest of the model that made the suggestion, picked the patch, or made the map that was corrected."""
    seconds: Seconds | None = None
    """Time from showing the patch to saving the label, per patch; None for imported labels."""
    areas: dict[int, Annotated[str, AfterValidator(checked_area)]] | None = None
    """Area of each class in the patch as WKT, in the patch's pixels, if outlines cover the patch completely."""
    files: tuple[Name, ...] = ()
    """Files of annotations, or corrected results, that the label was imported from, as `folder/name` or
    `folder/name (model digest)`. Empty for labels of the page and of earlier versions."""


class Undone(EventModel):
    """The labels with these event numbers do not count."""

    kind: Literal["undo"] = "undo"
    numbers: tuple[int, ...]


Event = FolderStarted | SlideAdded | ClassAdded | ClassRenamed | ClassesMerged | ClassRemoved | Labeled | Undone

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
"""Reads and writes events as JSON."""


Recorded = Entry[Event]
"""An event as it was saved."""
