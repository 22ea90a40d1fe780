"""Corrections of a result: regions whose class a person changed in wsi-view, and annotations that QuPath sent back.

They lie beside the result, which stays as it is:

results/
    slide/                         the result
    slide.corrections.sqlite       events of wsi-view, append-only
    slide.corrections.geojson      annotations of QuPath, all of them, written by send_corrections
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import shapely
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from models.tissue_class import ClassName, TissueClass
from pipeline.errors import LabelingError
from pipeline.formats.features import Feature, geojson_feature
from pipeline.labeling.event_file import Entry, EventFile, EventFormat, EventModel
from pipeline.labeling.events import Undone
from pipeline.results.names import CORRECTIONS_END, SENT_END

GRAY = (128, 128, 128)

Coordinate = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Ring = Annotated[tuple[tuple[Coordinate, Coordinate], ...], Field(min_length=4)]
Rings = Annotated[tuple[Ring, ...], Field(min_length=1)]


def _uuid(text: str) -> str:
    uuid.UUID(text)
    return text


def _one_area(rings_l0: Rings) -> Rings:
    polygon = shapely.Polygon(rings_l0[0], rings_l0[1:])
    if not polygon.is_valid:
        raise ValueError(f"is not a valid area: {shapely.is_valid_reason(polygon)}")
    return rings_l0


class Relabeled(EventModel):
    """A person gave a region another class. The latest event of a region that is not undone counts."""

    kind: Literal["relabel"] = "relabel"
    region: Annotated[str, AfterValidator(_uuid)]
    """Id of the region in the files of the result."""
    slide: str
    """Digest of the slide's file."""
    model: str
    """Digest of the model that made the result."""
    before: ClassName
    """Class in the result."""
    after: ClassName
    rings_l0: Annotated[Rings, AfterValidator(_one_area)]
    """Outline and holes, so that the correction outlives the result."""

    @property
    def polygon_l0(self) -> shapely.Polygon:
        """Return the region."""
        return shapely.Polygon(self.rings_l0[0], self.rings_l0[1:])


CorrectionEvent = Relabeled | Undone
_ADAPTER: TypeAdapter[CorrectionEvent] = TypeAdapter(Annotated[CorrectionEvent, Field(discriminator="kind")])

CORRECTION_EVENTS: EventFormat[CorrectionEvent] = EventFormat(
    "corrections",
    0x77736372,  # ASCII "wscr"
    1,
    _ADAPTER,
    """
CREATE VIEW corrections AS SELECT
    number, time, annotator,
    json_extract(event, '$.region') AS region, json_extract(event, '$.before') AS before,
    json_extract(event, '$.after') AS after, json_extract(event, '$.model') AS model
FROM events WHERE json_extract(event, '$.kind') = 'relabel';
""",
    "move it away",
)

Correction = Entry[Relabeled]
"""A correction with its author and time."""


def corrections_file(result: Path) -> Path:
    """Return the file of the corrections that wsi-view makes of the result in a folder.

    If the folder is a link, the file is beside the target of the link, so the corrections do not depend on the link.
    """
    return _beside(result, CORRECTIONS_END)


def sent_file(result: Path) -> Path:
    """Return the file that QuPath sends for the result in a folder, at the place of `corrections_file`."""
    return _beside(result, SENT_END)


def _beside(result: Path, end: str) -> Path:
    folder = result.resolve()
    return folder.with_name(folder.name + end)


def relabeled(feature: Feature, slide: str, model: str, after: str) -> Relabeled:
    """Return the event that gives a region of a result another class.

    Raises LabelingError for a region that a result of wsi-segment cannot have.
    """
    polygon = feature.geometry_l0
    rings = (polygon.exterior, *polygon.interiors)
    try:
        return Relabeled(
            region=feature.id,
            slide=slide,
            model=model,
            before=feature.tissue_class.name,
            after=after,
            rings_l0=tuple(tuple(map(tuple, shapely.get_coordinates(ring).tolist())) for ring in rings),
        )
    except ValidationError as error:
        raise LabelingError(
            f"the region {feature.id} cannot be corrected, because the result is damaged ({error}); segment the slide "
            f"again"
        ) from error


def read_corrections(result: Path) -> list[Correction]:
    """Return the current corrections of the result in a folder, in the order of saving; none without a file.

    Raises LabelingError if the file is damaged.
    """
    return current(read_entries(result))


def read_entries(result: Path) -> list[Entry[CorrectionEvent]]:
    """Return all events of the corrections of the result in a folder; none without a file.

    Raises LabelingError if the file is damaged.
    """
    file = corrections_file(result)
    if not file.exists():
        return []
    with EventFile(file, CORRECTION_EVENTS) as events:
        return events.read()


def alive(entries: Iterable[Entry[CorrectionEvent]]) -> list[Correction]:
    """Return the events that give a region a class and are not undone, in the order of saving."""
    kept: dict[int, Correction] = {}
    for entry in entries:
        match entry.event:
            case Relabeled() as event:
                kept[entry.number] = Entry(entry.number, entry.time, entry.annotator, event)
            case Undone(numbers=numbers):
                for number in numbers:
                    kept.pop(number, None)
    return list(kept.values())


def current(entries: Iterable[Entry[CorrectionEvent]]) -> list[Correction]:
    """Return the latest correction of each region, without regions that have their first class again."""
    latest: dict[str, Correction] = {}
    for one in alive(entries):
        latest.pop(one.event.region, None)
        latest[one.event.region] = one
    return [one for one in latest.values() if one.event.after != one.event.before]


def latest_own(
    entries: Iterable[Entry[CorrectionEvent]], author: str, shown: Callable[[Relabeled], bool]
) -> Correction | None:
    """Return an author's latest correction that is not undone, among those that are `shown`; None if there is none."""
    own = [one for one in alive(entries) if one.annotator == author and shown(one.event)]
    return own[-1] if own else None


def correction_features(corrections: Sequence[Correction], classes: Sequence[TissueClass]) -> Iterator[dict[str, Any]]:
    """Yield the corrections as QuPath reads them: annotations with their new class, author and time, not locked.

    `classes` have the colors. A class that is not among them, because another model made the result since, is gray.
    """
    known = {one.name: one for one in classes}
    for one in corrections:
        event = one.event
        tissue_class = known.get(event.after) or TissueClass(event.after, GRAY)
        # Another id than that of the region, which QuPath may already have.
        id_ = str(uuid.uuid5(uuid.UUID(event.region), event.after))
        made = geojson_feature(Feature(id_, 0, tissue_class, 0.0, event.polygon_l0))
        del made["properties"]["isLocked"], made["properties"]["measurements"]
        made["properties"]["metadata"] = {"author": one.annotator, "time": one.time, "class before": event.before}
        yield made
