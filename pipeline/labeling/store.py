"""The file of events: SQLite, append-only, and on the disk before `append` returns."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from pipeline.errors import LabelingError
from pipeline.labeling.events import EVENT, Event, Recorded

APPLICATION_ID = 0x77736C62
"""Marks the file as ours, in SQLite's header: "wslb"."""

VERSION = 1

BUSY_SECONDS = 30
"""Time to wait for another process that writes. A write takes milliseconds, on a slow network share longer."""

_SCHEMA = """
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    annotator TEXT NOT NULL,
    event TEXT NOT NULL CHECK (json_valid(event))
);
CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_are_never_deleted BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
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
"""The view is for people who read the file with other programs."""


class EventStore:
    """The events in one file. Threads and processes may share it. Use it as a context manager, or call `close`.

    Raises LabelingError if the file cannot be opened, or is not a file of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise LabelingError(
                f"{path}: cannot be opened as a file of labels ({error}); check its permissions, or restore a copy"
            ) from error

    def _prepare(self) -> None:
        execute = self._connection.execute
        # A rollback journal works on network shares, unlike a write-ahead log. EXTRA also syncs the folder after a
        # commit, so that a power cut does not undo it.
        execute("PRAGMA journal_mode = DELETE")
        execute("PRAGMA synchronous = EXTRA")
        execute("BEGIN IMMEDIATE")
        try:
            found = execute("PRAGMA application_id").fetchone()[0], execute("PRAGMA user_version").fetchone()[0]
            if found == (0, 0) and execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
                self._create()
            elif found != (APPLICATION_ID, VERSION):
                raise LabelingError(
                    f"{self._path}: is not a file of labels of version {VERSION}; pass another folder with --output, "
                    "or update wsi-segment"
                )
            execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def _create(self) -> None:
        for statement in _statements(_SCHEMA):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def append(self, annotator: str, events: Sequence[Event]) -> tuple[int, ...]:
        """Save events, all or none, and return their numbers. They are on the disk when this returns.

        Raises LabelingError if they cannot be saved.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [(time, annotator, event.model_dump_json()) for event in events]
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                numbers = tuple(
                    int(self._connection.execute("INSERT INTO events (time, annotator, event) VALUES (?, ?, ?)", row)
                        .lastrowid or 0)
                    for row in rows
                )  # fmt: skip
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                self._connection.rollback()
                raise LabelingError(
                    f"{self._path}: the labels are NOT saved ({error}); check the space on the disk and the permissions"
                ) from error
        return numbers

    def read(self, after: int = 0) -> list[Recorded]:
        """Return the events with a number above `after`, in their order. Raises LabelingError for a damaged file."""
        try:
            with self._lock:
                rows = self._connection.execute(
                    "SELECT number, time, annotator, event FROM events WHERE number > ? ORDER BY number", (after,)
                ).fetchall()
            return [Recorded(number, time, who, EVENT.validate_json(event)) for number, time, who, event in rows]
        except (sqlite3.Error, ValidationError) as error:
            raise LabelingError(f"{self._path}: is damaged ({error}); restore a copy of the file") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _statements(script: str) -> list[str]:
    """Return the statements of a script. `executescript` would commit the open transaction."""
    statements, start = [], 0
    for end in [i + 1 for i, letter in enumerate(script) if letter == ";"]:
        if sqlite3.complete_statement(script[start:end]):
            statements.append(script[start:end])
            start = end
    return statements
