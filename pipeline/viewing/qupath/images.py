"""The images of a QuPath project: the entries of project.qpproj, and the files that their URIs stand for.

QuPath writes absolute URIs and the project's own; where the project is found elsewhere, it looks for a lost image the
same way from there as it was from the former place. So does this.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote_to_bytes, urlsplit

from pipeline.errors import OutputError
from wsi.slide import slide_digest

log = logging.getLogger(__name__)

_OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
_VERSION = "0.6.0"  # of QuPath: the oldest that reads what is written


@dataclass(frozen=True)
class SlideFile:
    """A slide that a project should show."""

    result: Path
    """The folder of its result."""
    path: Path
    """Where it was when it was segmented; just its name for a result that does not say it."""
    digest: str


def load_project(path: Path) -> dict[str, Any]:
    """The project that is there, or a new one without images.

    Raises OutputError where the file is no project.
    """
    now = time.time_ns() // 1_000_000
    try:
        project = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["entryID"], int) for entry in project["images"]):
            raise ValueError("an image's entryID is no number")
    except FileNotFoundError:
        stamps = {"createTimestamp": now, "modifyTimestamp": now}
        return {"version": _VERSION, **stamps, "uri": _uri(path), "lastID": 0, "images": []}
    except (ValueError, LookupError, TypeError) as error:
        raise OutputError(
            f"{path}: is no project that QuPath could read ({error}); move the folder {path.parent} away, and a new "
            f"one is made"
        ) from error
    return cast("dict[str, Any]", project)


def enter_slides(
    project: dict[str, Any], path: Path, slides: Sequence[SlideFile], search: Path | None
) -> list[dict[str, Any]]:
    """Find or add the entry of each slide in the project that belongs at `path`; returns the entries.

    Entries keep their ids and all that QuPath wrote there; a URI changes only where its file has moved, together with
    the project or into the folder `search`. A slide that is not to be found is entered as it was, with a warning.
    """
    former = _path(str(project.get("uri", ""))) or path

    def moved(file: Path) -> Path:
        beside = Path(os.path.normpath(path.parent / os.path.relpath(file, former.parent)))
        return beside if not file.exists() and former.parent != path.parent and beside.exists() else file

    by_file: dict[Path, dict[str, Any]] = {}
    for entry in project["images"]:
        files = _files(entry.get("serverBuilder"))
        entry["serverBuilder"] = _with_files(entry.get("serverBuilder"), {file: moved(file) for file in files})
        for file in _files(entry["serverBuilder"]):
            by_file.setdefault(file, entry)

    entries = []
    for slide in slides:
        recorded = moved(slide.path) if slide.path.is_absolute() else slide.path
        file = _find(slide, recorded, search)
        entry = by_file.get(file) or by_file.get(recorded) or by_file.get(slide.path)
        if entry is None:
            project["lastID"] = 1 + max([project.get("lastID", 0), *(e["entryID"] for e in project["images"])])
            entry = _new_entry(file, project["lastID"])
            project["images"].append(entry)
        elif file.exists():
            entry["serverBuilder"] = _with_files(entry["serverBuilder"], {recorded: file, slide.path: file})
        entries.append(entry)
    if all(file.exists() for entry in project["images"] for file in _files(entry["serverBuilder"])):
        # Else the former place still tells where a lost slide was, seen from there.
        project["uri"] = _uri(path)
    return entries


def _find(slide: SlideFile, recorded: Path, search: Path | None) -> Path:
    """Where the slide is now; where it was, with a warning, if it is not to be found."""
    if recorded.is_absolute() and recorded.exists():
        return recorded
    name = glob.escape(recorded.name)
    candidates = [] if search is None else sorted(p for p in search.absolute().rglob(name) if p.is_file())
    for candidate in candidates:
        # Another patient's slide may have the same name.
        if slide_digest(candidate) == slide.digest:
            return candidate
    reason = f"{len(candidates)} found by that name hold something else; " if candidates else ""
    log.warning(
        "%s: the slide is not at %s; %sQuPath will ask where it is, or pass --slides with the folder it is in now",
        slide.result.name,
        recorded,
        reason,
    )
    return recorded if recorded.is_absolute() else slide.result.parent / recorded


def _new_entry(file: Path, number: int) -> dict[str, Any]:
    builder = {"builderType": "uri", "providerClassName": _OPENSLIDE, "uri": _uri(file), "args": []}
    return {"serverBuilder": builder, "entryID": number, "imageName": file.name, "metadata": {}, "tags": []}


def _files(builder: object) -> list[Path]:
    """The files of a server builder; QuPath nests builders for rotated or cropped images."""
    return [file for uri in _uris(builder) if (file := _path(uri)) is not None]


def _uris(builder: object) -> Iterator[str]:
    if isinstance(builder, dict):
        for key, value in builder.items():
            if key == "uri" and isinstance(value, str):
                yield value
            else:
                yield from _uris(value)
    elif isinstance(builder, list):
        for value in builder:
            yield from _uris(value)


def _with_files(builder: Any, places: Mapping[Path, Path]) -> Any:
    """The builder with its files replaced; a URI whose file stays is left as it is written."""
    if isinstance(builder, list):
        return [_with_files(value, places) for value in builder]
    if not isinstance(builder, dict):
        return builder
    new = {key: _with_files(value, places) for key, value in builder.items()}
    file = _path(builder["uri"]) if isinstance(builder.get("uri"), str) else None
    if file is not None and places.get(file, file) != file:
        new["uri"] = _uri(places[file])
    return new


def _uri(file: Path) -> str:
    """As Java writes the URI of a file."""
    return f"file:{quote(os.fsencode(os.path.normpath(file.absolute())), safe='/')}"


def _path(uri: str) -> Path | None:
    """The file of a URI; None where it is no file's."""
    parts = urlsplit(uri)
    return Path(os.path.normpath(os.fsdecode(unquote_to_bytes(parts.path)))) if parts.scheme == "file" else None
