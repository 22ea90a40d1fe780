"""Record the finished blocks: one line each, in a file that survives a crash.

A block is done when its files are on disk, and after them its line. After a crash, a resume uses the lines that are
complete, that belong to the same inputs, and whose files have the digests in the line.

The lines are published with the result, without times and in the order of the blocks. A repair starts from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.files import sync, sync_descriptor
from pipeline.results.digests import file_facts
from pipeline.slide.blocks import BlockRecord


class Journal:
    """The journal in the working folder of one slide. Threads may append to it at the same time."""

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self._folder = folder
        self._identity = identity
        self._path = folder / "journal.jsonl"
        self._lock = threading.Lock()

    def append(self, record: BlockRecord) -> None:
        """Make a block's record durable. The block's files must be durable before (`make_durable`)."""
        line = _line(_digest_of(self._identity), record)
        with self._lock, self._path.open("ab") as journal:
            # After a line that a crash cut short, start a new line.
            if journal.tell() and not _ends_with_newline(self._path):
                journal.write(b"\n")
            journal.write(line)
            journal.flush()
            sync_descriptor(journal.fileno())
        # The file may be new, and its name must survive a power cut too.
        sync(self._folder)

    def finished(self) -> dict[int, BlockRecord]:
        """Return the records of the blocks that need not be computed again, by index.

        Damaged lines, lines of other inputs, and blocks with missing or changed files are skipped. So are blocks
        with unreadable pixels, margins included, because another attempt may succeed.
        """
        found = read_records(self._path, self._identity)
        return {record.index: record for record in found if self._files_match(record)}

    def _files_match(self, record: BlockRecord) -> bool:
        return all(has_digest(self._folder / name, digest) for name, digest in record.files.items())


def write_records(path: Path, identity: Mapping[str, object], records: Iterable[BlockRecord]) -> None:
    """Write the records of all blocks of a result, without times. The bytes do not depend on the order of the run."""
    digest = _digest_of(identity)
    path.write_bytes(b"".join(_line(digest, replace(record, seconds={})) for record in records))


def read_records(path: Path, identity: Mapping[str, object]) -> list[BlockRecord]:
    """Return the records of a journal or of a result, except damaged lines and lines of other inputs.

    Blocks with unreadable pixels, margins included, are left out, because another attempt may succeed.
    """
    if not path.is_file():
        return []
    digest = _digest_of(identity)
    found = (_record(digest, line) for line in path.read_bytes().splitlines())
    return [record for record in found if record is not None and not record.unreadable]


def make_durable(folder: Path, record: BlockRecord, files: Iterable[Path]) -> BlockRecord:
    """Flush a block's files in the working folder to disk. Return the block's record with the digests of the files."""
    files = list(files)
    for path in files:
        sync(path)
    # Every folder on the way is flushed: after a power cut a file exists only if each of them has its entry.
    for parent in sorted({parent for path in files for parent in path.parents if parent.is_relative_to(folder)}):
        sync(parent)
    return replace(record, files={path.relative_to(folder).as_posix(): file_facts(path).sha256 for path in files})


def has_digest(path: Path, digest: str) -> bool:
    """Return whether a file exists and has this SHA-256."""
    return path.is_file() and file_facts(path).sha256 == digest


def _digest_of(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


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
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _checksum(identity: str, body: str) -> str:
    return hashlib.sha256(f"{identity}\n{body}".encode()).hexdigest()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
