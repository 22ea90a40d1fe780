"""A file of events: SQLite, append-only, and on the disk before `append` returns."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import LabelingError


class EventModel(BaseModel):
    """An event. Unknown keys are refused, because an older version would lose them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


E = TypeVar("E", bound=EventModel)

_creating = threading.Lock()

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
"""


@dataclass(frozen=True)
class EventFormat(Generic[E]):
    """A kind of file of events."""

    what: str
    """What the file contains, for messages."""
    application_id: int
    """Marks the file as ours, in SQLite's header."""
    version: int
    adapter: TypeAdapter[E]
    """Reads and writes events as JSON."""
    view: str
    """A view for people who read the file with other programs, as SQL."""
    instead: str
    """What to do with a file of another kind, for messages."""


@dataclass(frozen=True)
class Entry(Generic[E]):
    """An event as it was saved."""

    number: int
    """1 for the first event of a file."""
    time: str
    """UTC, ISO 8601."""
    annotator: str
    event: E


class EventFile(Generic[E]):
    """The events in one file. Threads and processes may share it. Use it as a context manager, or call `close`.

    Raises LabelingError if the file cannot be opened, or is not a file of this version.
    """

    def __init__(self, path: Path, format_: EventFormat[E]) -> None:
        self._path = path
        self._format = format_
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create_for_group(path)
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
                f"{path}: cannot be opened as a file of {format_.what} ({error}); check its permissions, or restore a "
                "copy"
            ) from error

    def _prepare(self) -> None:
        execute = self._connection.execute
        # A rollback journal works on network shares, unlike a write-ahead log. EXTRA also syncs the folder after a
        # commit, so that a power cut does not undo it.
        execute("PRAGMA journal_mode = DELETE")
        execute("PRAGMA synchronous = EXTRA")
        # On macOS, empty the drive's cache too, see `sync_descriptor`. Other systems ignore this.
        execute("PRAGMA fullfsync = ON")
        execute("BEGIN IMMEDIATE")
        try:
            found = execute("PRAGMA application_id").fetchone()[0], execute("PRAGMA user_version").fetchone()[0]
            if found == (0, 0) and execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
                self._create()
            elif found != (self._format.application_id, self._format.version):
                raise LabelingError(
                    f"{self._path}: is not a file of {self._format.what} of version {self._format.version}; "
                    f"{self._format.instead}, or update wsi-segment"
                )
            execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def _create(self) -> None:
        for statement in _statements(_SCHEMA + self._format.view):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {self._format.application_id}")
        self._connection.execute(f"PRAGMA user_version = {self._format.version}")

    def append(self, annotator: str, events: Sequence[E]) -> tuple[int, ...]:
        """Save events, all or none, and return their numbers. They are on the disk when this returns.

        Raises LabelingError if they cannot be saved.
        """
        with self._writing():
            return self._insert(annotator, events)

    def append_decided(self, annotator: str, decide: Callable[[Sequence[Entry[E]]], Sequence[E]]) -> tuple[int, ...]:
        """Call `decide` with the events of the file, and save those it returns. No other process writes in between.

        `decide` must not use this object. If it raises an exception, nothing is saved. Raises LabelingError
        if the file is damaged or the events cannot be saved.
        """
        with self._writing():
            return self._insert(annotator, decide(self._entries(after=0)))

    def read(self, after: int = 0) -> list[Entry[E]]:
        """Return the events with a number above `after`, in their order. Raises LabelingError for a damaged file."""
        with self._lock:
            return self._entries(after)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold a transaction in which only this process writes. Roll it back on any error."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                self._connection.rollback()
                raise LabelingError(
                    f"{self._path}: the {self._format.what} are NOT saved ({error}); check the space on the disk and "
                    "the permissions"
                ) from error
            except BaseException:
                self._connection.rollback()
                raise

    def _insert(self, annotator: str, events: Sequence[E]) -> tuple[int, ...]:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        insert = "INSERT INTO events (time, annotator, event) VALUES (?, ?, ?)"
        rows = [(time, annotator, event.model_dump_json()) for event in events]
        return tuple(int(self._connection.execute(insert, row).lastrowid or 0) for row in rows)

    def _entries(self, after: int) -> list[Entry[E]]:
        validate = self._format.adapter.validate_json
        try:
            rows = self._connection.execute(
                "SELECT number, time, annotator, event FROM events WHERE number > ? ORDER BY number", (after,)
            ).fetchall()
            return [Entry(number, _text(time), _text(who), validate(event)) for number, time, who, event in rows]
        except sqlite3.Error as error:
            raise LabelingError(f"{self._path}: is damaged ({error}); restore a copy of the file") from error
        except (ValidationError, TypeError) as error:
            raise LabelingError(
                f"{self._path}: is damaged, or was written by a newer version of wsi-segment ({error}); update "
                "wsi-segment, or restore a copy of the file"
            ) from error

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


def _create_for_group(path: Path) -> None:
    """Create the file, if it does not exist, with the permissions of the umask. SQLite would let only its owner write.

    If this user may not create files here, SQLite reports it.
    """
    # Only a new file, and one thread at a time: closing a file ends the locks that SQLite has on it in this process.
    with _creating, suppress(FileExistsError, PermissionError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))


def _text(value: object) -> str:
    """Return a value that must be text. SQLite stores any type in any column."""
    if not isinstance(value, str):
        raise TypeError(f"a time or an annotator is not text but {type(value).__name__}")
    return value


def _statements(script: str) -> list[str]:
    """Return the statements of a script. `executescript` would commit the open transaction."""
    statements, start = [], 0
    for end in [i + 1 for i, letter in enumerate(script) if letter == ";"]:
        if sqlite3.complete_statement(script[start:end]):
            statements.append(script[start:end])
            start = end
    return statements
