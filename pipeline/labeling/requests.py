"""What the page may send. Anything else is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.labeling.events import Mark, Place, Reason, Seconds, View
from pipeline.labeling.session import NewLabel

PatchId = Annotated[str, Field(max_length=20)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class LabelsRequest(_Request):
    """Labels that are saved together, and patches that were excluded from a grid."""

    labels: Annotated[tuple[LabelRequest, ...], Field(max_length=100)]
    excluded: Annotated[tuple[PatchId, ...], Field(max_length=100)] = ()


class PatchRequest(_Request):
    """A patch; empty for a request about none."""

    patch: PatchId = ""


class GridRequest(_Request):
    """A grid of patches that are similar to those with a class."""

    class_id: int
