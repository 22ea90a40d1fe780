"""The record of finished blocks: one line each in a file that survives a crash.

A block counts as done when its files are on the disk and then its line is. Whatever a crash leaves behind, a resume
takes those lines that are whole, of the same inputs, and whose files are as the line says.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.files import sync
from pipeline.slide.blocks import BlockRecord


class Journal:
    """The journal of one slide's working folder. Threads may append to it at the same time."""

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self._folder = folder
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._path = folder / "journal.jsonl"
        self._lock = threading.Lock()

    def append(self, record: BlockRecord) -> None:
        """Make a block's record durable; its files have to be so before (`make_durable`)."""
        line = _line(self._identity, record)
        with self._lock, self._path.open("ab") as journal:
            # A line that a crash cut short must not swallow this one.
            if journal.tell() and not _ends_with_newline(self._path):
                journal.write(b"\n")
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())
        # The file may be new: its name has to outlast a power cut, too.
        sync(self._folder)

    def finished(self) -> dict[int, BlockRecord]:
        """The blocks that need not be computed again, by index.

        Left out are lines that are damaged or of other inputs, blocks whose files are missing or changed, and blocks
        with unreadable tiles, which are worth another try.
        """
        if not self._path.exists():
            return {}
        records: dict[int, BlockRecord] = {}
        for line in self._path.read_bytes().splitlines():
            record = _record(self._identity, line)
            if record is not None and not record.bad_tiles_l0 and self._files_match(record):
                records[record.index] = record
        return records

    def _files_match(self, record: BlockRecord) -> bool:
        paths = {self._folder / name: digest for name, digest in record.files.items()}
        return all(path.is_file() and _digest(path) == digest for path, digest in paths.items())


def make_durable(folder: Path, record: BlockRecord, files: Iterable[Path]) -> BlockRecord:
    """Bring a block's files, which lie in the working folder, to the disk; returns its record with their digests."""
    files = list(files)
    for path in files:
        sync(path)
    # All the way up: after a power cut a new file is there only if every folder on its way has its entry.
    for parent in sorted({parent for path in files for parent in path.parents if parent.is_relative_to(folder)}):
        sync(parent)
    return replace(record, files={path.relative_to(folder).as_posix(): _digest(path) for path in files})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(identity: str, record: BlockRecord) -> bytes:
    body = json.dumps(asdict(record), sort_keys=True)
    return json.dumps({"sum": _checksum(identity, body), "record": body}).encode() + b"\n"


def _record(identity: str, line: bytes) -> BlockRecord | None:
    try:
        entry = json.loads(line)
        body = entry["record"]
        if entry["sum"] != _checksum(identity, body):
            return None
        return BlockRecord(**json.loads(body))
    except (ValueError, KeyError, TypeError):
        return None


def _checksum(identity: str, body: str) -> str:
    return hashlib.sha256(f"{identity}\n{body}".encode()).hexdigest()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
