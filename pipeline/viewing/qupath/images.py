"""The images of a QuPath project: the entries of project.qpproj, and the files of their URIs.

QuPath writes absolute URIs, and the URI of the project. If the project has moved, QuPath looks for a lost image at the
same relative path from the new place. This module does the same.
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
_VERSION = "0.6.0"  # the oldest QuPath that can read the project


@dataclass(frozen=True)
class SlideFile:
    """A slide for a project."""

    result: Path
    """The folder of the result."""
    path: Path
    """The slide's path during segmentation; only its name if the record has no path."""
    digest: str
    title: str
    """Name of the image in the project: that of the result, with the ending of the file."""


def load_project(path: Path) -> dict[str, Any]:
    """Return the existing project, or a new one without images.

    Raises OutputError if the file is not a project.
    """
    now = time.time_ns() // 1_000_000
    try:
        project = json.loads(path.read_text(encoding="utf-8"))
        _check(project)
    except FileNotFoundError:
        stamps = {"createTimestamp": now, "modifyTimestamp": now}
        return {"version": _VERSION, **stamps, "uri": _uri(path), "lastID": 0, "images": []}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{path}: is not a project that QuPath can read ({error}); move the folder {path.parent} away and run the "
            f"same command again"
        ) from error
    return cast("dict[str, Any]", project)


def _check(project: Any) -> None:
    """Raise ValueError, LookupError, TypeError or AttributeError if a value that this package reads cannot be used.

    Raise RecursionError if the project is nested too deeply to be changed or written.
    """
    json.dumps(project, indent=2)
    if not isinstance(project.get("lastID", 0), int):
        raise ValueError("lastID is not a number")
    for entry in project["images"]:
        if not isinstance(entry["entryID"], int):
            raise ValueError("an image's entryID is not a number")
        if not isinstance(entry.get("metadata") or {}, dict):
            raise ValueError("an image's metadata is not an object")
        _files(_with_files(entry.get("serverBuilder"), {}))
    _path(str(project.get("uri", "")))


def enter_slides(
    project: dict[str, Any], path: Path, slides: Sequence[SlideFile], search: Path | None
) -> list[dict[str, Any]]:
    """Find or add the entry of each slide in the project of `path`, and return the entries, each a different one.

    Two results of one file have two entries: each gets the entry with its title, or else the first one that is left.
    Entries keep their ids and everything that QuPath wrote. A URI changes only if its file moved, together with the
    project or into the folder `search`. A slide that is not found keeps its former path, with a warning.
    """
    former = _path(str(project.get("uri", ""))) or path

    def moved(file: Path) -> Path:
        beside = Path(os.path.normpath(path.parent / os.path.relpath(file, former.parent)))
        return beside if not file.exists() and former.parent != path.parent and beside.exists() else file

    by_file: dict[Path, list[dict[str, Any]]] = {}
    for entry in project["images"]:
        files = _files(entry.get("serverBuilder"))
        entry["serverBuilder"] = _with_files(entry.get("serverBuilder"), {file: moved(file) for file in files})
        for file in _files(entry["serverBuilder"]):
            by_file.setdefault(file, []).append(entry)

    places = []
    for slide in slides:
        recorded = moved(slide.path) if slide.path.is_absolute() else slide.path
        places.append((_find(slide, recorded, search), recorded, slide.path))
    found = [[entry for file in dict.fromkeys(files) for entry in by_file.get(file, [])] for files in places]
    taken = _assigned(slides, found)

    entries = []
    for slide, (file, recorded, _), entry in zip(slides, places, taken, strict=True):
        if entry is None:
            project["lastID"] = 1 + max([project.get("lastID", 0), *(e["entryID"] for e in project["images"])])
            entry = _new_entry(file, slide.title, project["lastID"])
            project["images"].append(entry)
        elif file.exists():
            entry["serverBuilder"] = _with_files(entry["serverBuilder"], {recorded: file, slide.path: file})
        entries.append(entry)
    if all(file.exists() for entry in project["images"] for file in _files(entry["serverBuilder"])):
        # Otherwise the former place is still needed to find lost slides relative to it.
        project["uri"] = _uri(path)
    return entries


def _assigned(slides: Sequence[SlideFile], found: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any] | None]:
    """Return one of the entries that were found for each slide, or None if none is left."""
    assigned: list[dict[str, Any] | None] = [None] * len(slides)
    used = set[int]()
    for by_title in (True, False):
        for n, slide in enumerate(slides):
            free = [one for one in found[n] if one["entryID"] not in used]
            fitting = [one for one in free if one.get("imageName") == slide.title] if by_title else free
            if assigned[n] is None and fitting:
                assigned[n] = fitting[0]
                used.add(fitting[0]["entryID"])
    return assigned


def _find(slide: SlideFile, recorded: Path, search: Path | None) -> Path:
    """Return the slide's current path. If the slide is not found, log a warning and return the recorded path."""
    if recorded.is_absolute() and recorded.exists():
        return recorded
    name = glob.escape(recorded.name)
    candidates = [] if search is None else sorted(p for p in search.absolute().rglob(name) if p.is_file())
    for candidate in candidates:
        # A slide of another patient can have the same name.
        if slide_digest(candidate) == slide.digest:
            return candidate
    reason = f"{len(candidates)} files of that name have other contents; " if candidates else ""
    log.warning(
        "%s: the slide is not at %s; %spass its new folder with --slides, or QuPath asks for the slide",
        slide.result.name,
        recorded,
        reason,
    )
    return recorded if recorded.is_absolute() else slide.result.parent / recorded


def _new_entry(file: Path, title: str, number: int) -> dict[str, Any]:
    builder = {"builderType": "uri", "providerClassName": _OPENSLIDE, "uri": _uri(file), "args": []}
    return {"serverBuilder": builder, "entryID": number, "imageName": title, "metadata": {}, "tags": []}


def files_of(entry: Mapping[str, Any]) -> list[Path]:
    """Return the files of an entry."""
    return _files(entry.get("serverBuilder"))


def _files(builder: object) -> list[Path]:
    """Return the files of a server builder. QuPath nests builders for rotated or cropped images."""
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
    """Return the builder with its files replaced. The URI of a file that did not move keeps its spelling."""
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
    """Return the URI of a file as Java writes it."""
    return f"file:{quote(os.fsencode(os.path.normpath(file.absolute())), safe='/')}"


def _path(uri: str) -> Path | None:
    """Return the file of a URI; None if it is not a file URI. Raises ValueError if it is not a URI."""
    parts = urlsplit(uri)
    return Path(os.path.normpath(os.fsdecode(unquote_to_bytes(parts.path)))) if parts.scheme == "file" else None
