"""The digests of a result: which files are missing or differ from what the run wrote.

run.json     the size and the SHA-256 of each file beside it, and of its own values
chunks.tsv   the same for each file of the map: one line "SHA-256, bytes, path", separated by tabs, sorted by path

`run.json` thus stays small for a map of thousands of chunks, and a check of the sizes reads two small files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import RunRecordError
from pipeline.results.names import LISTING, MAP_END, RUN
from pipeline.results.record import FileFacts, Run, read_run, record_is_unchanged, write_run

Listing = dict[str, FileFacts]
"""The facts about each file of the map, by its path in the map."""


def file_facts(path: Path) -> FileFacts:
    """Return the size and the digest of a file."""
    with path.open("rb") as file:
        return FileFacts(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=os.fstat(file.fileno()).st_size)


def list_files(folder: Path) -> Listing:
    """Return the facts about each file below a folder."""
    return {name: file_facts(folder / name) for name in sorted(_names(folder))}


def write_result(folder: Path, run: Run, listing: Listing) -> Run:
    """Write `chunks.tsv`, and `run.json` with the digests of all other files. Return the record that was written."""
    lines = [f"{facts.sha256}\t{facts.bytes}\t{name}\n" for name, facts in sorted(listing.items())]
    (folder / LISTING).write_text("".join(lines), encoding="utf-8", newline="")
    names = [name for name in run.outputs if name != RUN and not name.endswith(MAP_END)]
    run = run.model_copy(update={"digests": {name: file_facts(folder / name) for name in names}})
    write_run(folder, run)
    return run


def changed_files(folder: Path, *, read: bool = False) -> list[str]:
    """Return a sentence for each file of a result that is missing, has changed or was added to the map.

    The presence and the sizes of all files are compared. `read`: compare the digests too, which reads every file.
    Files that others have put beside those of the result do not count.
    """
    try:
        run = read_run(folder)
    except RunRecordError as error:
        return [str(error)]
    if run is None:
        return [f"{RUN} is missing or is not a record of wsi-segment"]
    if not record_is_unchanged(folder):
        return [f"{RUN} has other values than the run wrote"]
    found = [text for name in run.outputs for text in _changes_of(folder, name, run.digests, read=read)]
    if LISTING in run.digests and not _changes(folder, LISTING, run.digests[LISTING], read=True):
        for name in run.outputs:
            if name.endswith(MAP_END):
                found += _changes_of_map(folder, name, _read_listing(folder / LISTING), read=read)
    return found


def missing_map_files(folder: Path, run: Run) -> list[str]:
    """Return the path of each file that a result's map lacks, sorted; none if the listing cannot be trusted.

    Readers of the map treat a missing chunk as empty. Only the listing shows which chunks must exist. A file in a
    folder that cannot be examined is not missing: reading it fails with the reason.
    """
    if LISTING not in run.digests or _changes(folder, LISTING, run.digests[LISTING], read=True):
        return []
    listed = sorted(_read_listing(folder / LISTING))
    maps = [name for name in run.outputs if name.endswith(MAP_END)]
    return [f"{name}/{path}" for name in maps for path in listed if _is_missing(folder / name / path)]


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _changes_of(folder: Path, name: str, digests: Mapping[str, FileFacts], *, read: bool) -> list[str]:
    if name == RUN or name.endswith(MAP_END):
        return []
    if name not in digests:
        return [f"{RUN} does not have the digest of {name}"]
    # The listing is read in any case.
    return _changes(folder, name, digests[name], read=read or name == LISTING)


def _changes_of_map(folder: Path, name: str, listing: Listing, *, read: bool) -> Iterator[str]:
    for path, facts in listing.items():
        yield from _changes(folder, f"{name}/{path}", facts, read=read)
    yield from (f"{name}/{path} is not a file of the result" for path in sorted(_names(folder / name) - set(listing)))


def _changes(folder: Path, name: str, facts: FileFacts, *, read: bool) -> list[str]:
    try:
        status = (folder / name).stat()
        if not stat.S_ISREG(status.st_mode):
            return [f"{name} is not a file"]
        if status.st_size != facts.bytes:
            return [f"{name} has {status.st_size} bytes instead of {facts.bytes}"]
        if read and file_facts(folder / name).sha256 != facts.sha256:
            return [f"{name} has other content than the run wrote"]
    except FileNotFoundError:
        return [f"{name} is missing"]
    except OSError as error:
        return [f"{name} cannot be read: {error.strerror or error}"]
    return []


def _read_listing(path: Path) -> Listing:
    """Return the content of a listing whose digest is right."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: FileFacts(sha256=sha256, bytes=int(size)) for sha256, size, name in rows}


def _names(folder: Path) -> set[str]:
    """Return the path of each file below a folder. Hidden files of a desktop, such as .DS_Store, do not count."""
    return {
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") or name.startswith(".z")
    }
