"""The file of labels: events in SQLite, append-only."""

from __future__ import annotations

from pathlib import Path

from pipeline.labeling.event_file import EventFile, EventFormat
from pipeline.labeling.events import EVENT, Event

APPLICATION_ID = 0x77736C62
"""ASCII "wslb"."""

VERSION = 1

_VIEW = """
CREATE VIEW labels AS SELECT
    number, time, annotator,
    json_extract(event, '$.place.slide') AS slide,
    json_extract(event, '$.place.x_l0') AS x_l0, json_extract(event, '$.place.y_l0') AS y_l0,
    json_extract(event, '$.place.side') AS side, json_extract(event, '$.place.mpp') AS mpp,
    json_extract(event, '$.answers') AS answers, json_extract(event, '$.mark') AS mark,
    json_extract(event, '$.source') AS source, json_extract(event, '$.view') AS view,
    json_extract(event, '$.reason') AS reason, json_extract(event, '$.suggested') AS suggested,
    json_extract(event, '$.model') AS model, json_extract(event, '$.seconds') AS seconds
FROM events WHERE json_extract(event, '$.kind') = 'label';
"""

LABEL_EVENTS: EventFormat[Event] = EventFormat(
    "labels", APPLICATION_ID, VERSION, EVENT, _VIEW, "pass another folder with --output"
)


class EventStore(EventFile[Event]):
    """The events of a labels folder. Raises the errors of `EventFile`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LABEL_EVENTS)
