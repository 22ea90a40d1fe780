"""What the page may send. Anything else is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.labeling.events import Mark, Place, Reason, Seconds, View
from pipeline.labeling.session import NewLabel

PatchId = Annotated[str, Field(max_length=20)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _ChangeRequest(_Request):
    session: Annotated[str, Field(max_length=16)] = ""
    """`Session.id` of the page, which can outlive its server; empty for a client that is not a page."""


class LabelRequest(_Request):
    """A label of one patch."""

    patch: PatchId
    answers: Annotated[dict[int, Literal["present", "absent"]], Field(max_length=254)]
    mark: Mark
    view: View
    reason: Reason
    seconds: Seconds | None
    suggested: dict[int, Annotated[float, Field(ge=0, le=1)]] | None

    def as_label(self, place: Place) -> NewLabel:
        """Return the label of this patch."""
        return NewLabel(place, self.answers, self.mark, self.view, self.seconds, self.suggested)


class LabelsRequest(_ChangeRequest):
    """Labels that are saved together, and patches that were excluded from a grid."""

    labels: Annotated[tuple[LabelRequest, ...], Field(max_length=100)]
    excluded: Annotated[tuple[PatchId, ...], Field(max_length=100)] = ()
    order: Annotated[str, Field(max_length=36)] = ""
    """Names this request, so that one that is sent again is saved once; empty for none."""
    again: bool = False
    """Whether the page has sent this order before and does not know whether it was saved."""


class PatchRequest(_Request):
    """A patch."""

    patch: PatchId


class UndoRequest(_ChangeRequest):
    """The labels to undo."""

    last: Annotated[tuple[int, ...], Field(max_length=1000)]
    """The numbers that the page got as `last`. Another tab may have saved labels since."""


class GridRequest(_Request):
    """A grid of patches that are similar to those with a class."""

    class_id: int
