"""A QuPath project of all results in a folder.

results/qupath/
    project.qpproj                  the slides, read by OpenSlide, so that QuPath and the polygons have one origin
    classifiers/classes.json        the classes with their colors
    scripts/*.groovy                scripts that import the polygons and show a probability over the slide
    results.tsv                     input of the scripts: the paths of each image's files
    maps/<slide>/                   pictures of the probabilities, and tiles

QuPath stores a user's objects in `data/<entryID>`. The project never loses them: new slides are added to an existing
project, and its entries keep their ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from models.tissue_class import Color, TissueClass
from pipeline.errors import MapFileError, OutputError, RunRecordError
from pipeline.files import file_lock, write_atomically
from pipeline.formats.left_out import CLASSES as LEFT_OUT_CLASSES
from pipeline.results.find import result_folders
from pipeline.results.names import FAMILIARITY, GEOJSON_END, LEFT_OUT, MAP_END, RUN
from pipeline.results.record import Run, read_header, read_run
from pipeline.viewing.qupath.images import SlideFile, enter_slides, files_of, load_project
from pipeline.viewing.qupath.maps import ProbabilityMap, write_overlays, write_tiles

log = logging.getLogger(__name__)

FOLDER = "qupath"
"""Name of the project's folder in the folder of results."""

SCRIPTS = Path(__file__).parent / "scripts"

_COLUMNS = (
    "entryID",
    "name",
    "slide",
    "geojson",
    "left_out",
    "tiles",
    "overlays",
    "width",
    "height",
    "classes",
    "warning",
)

_WARNING = "Warning of wsi-segment"
"""Metadata key of an image that does not look like the training data of the model. QuPath lists it with the image."""


@dataclass(frozen=True)
class _Result:
    """One slide's result."""

    folder: Path
    name: str
    """Path of the result below the output folder, with slashes."""
    slide: SlideFile
    digest: str
    """Digest of the run's identity."""
    map: ProbabilityMap
    left_out: tuple[TissueClass, ...]
    """The classes of the areas beside the tissue that the slide has."""
    warning: str
    """Why the map of this slide cannot be trusted; empty if nothing is known."""

    @property
    def geojson(self) -> Path:
        return self.folder / f"{self.folder.name}{GEOJSON_END}"

    @property
    def left_out_geojson(self) -> Path:
        return self.folder / LEFT_OUT


def write_project(output: Path, *, tiles: bool = False, slides: Path | None = None) -> Path:
    """Write or update the QuPath project of the results in `output`, and return its project.qpproj.

    tiles: also write tile objects with the classes' probabilities as measurements. slides: folder to search, by name
    and content, for slides that have moved since they were segmented. A slide that moved together with the project is
    found without it. Any other lost slide keeps its former path, and a warning is logged. A result that cannot be read
    is left out with a warning.

    Raises OutputError if there are no results, or if the project cannot be read or written. After an error, the
    project is as before.
    """
    folder = output.absolute() / FOLDER
    try:
        results = list(_results(output.absolute()))
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{output}: cannot be read ({reason}); check the path and its permissions") from error
    if not results:
        raise OutputError(f"{output}: no results of wsi-segment in this folder; pass the folder of the results")
    try:
        with file_lock(output / ".qupath.lock"):
            return _write(folder, results, tiles=tiles, slides=slides)
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); check that there is space and "
            f"that the folder is writable"
        ) from error


def _write(folder: Path, results: Sequence[_Result], *, tiles: bool, slides: Path | None) -> Path:
    path = folder / "project.qpproj"
    project = load_project(path)
    before = json.dumps(project)
    classes = _load_classes(folder / "classifiers" / "classes.json")
    drawn = list(_drawn(folder, results, tiles=tiles))
    if not drawn:
        raise OutputError(f"{folder.parent}: none of the maps can be read; segment the slides again with --force")
    _add_classes(classes, [result for result, _ in drawn])
    entries = enter_slides(project, path, [result.slide for result, _ in drawn], slides)

    for entry, (result, _) in zip(entries, drawn, strict=True):
        _set_warning(entry, result.warning)
    for name in ("classifiers", "scripts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [_row(folder, entry, *one) for entry, one in zip(entries, drawn, strict=True)]
    write_atomically(folder / "results.tsv", "".join("\t".join(row) + "\n" for row in [_COLUMNS, *rows]))
    for script in SCRIPTS.glob("*.groovy"):
        write_atomically(folder / "scripts" / script.name, script.read_text(encoding="utf-8"))
    write_atomically(folder / "README.txt", (SCRIPTS / "README.txt").read_text(encoding="utf-8"))
    write_atomically(folder / "classifiers" / "classes.json", _json(classes))
    if json.dumps(project) != before:
        project["modifyTimestamp"] = time.time_ns() // 1_000_000
        write_atomically(path, _json(project))
    return path


def _results(output: Path) -> Iterator[_Result]:
    if not output.is_dir():
        return
    for folder in result_folders(output):
        if read_header(folder) is None:
            log.warning("%s: left out: its %s is damaged or was written by another program", folder, RUN)
            continue
        if folder == output / FOLDER:
            raise OutputError(f"{folder}: a slide's result has the name of the project's folder; rename the slide")
        try:
            run = read_run(folder)
        except RunRecordError as error:
            log.warning("%s: left out: %s", folder, error)
            continue
        store = folder / f"{folder.name}{MAP_END}"
        if run is None or not store.is_dir():
            log.warning("%s: left out: %s is missing; segment the slide again with --force", folder, store.name)
            continue
        yield _result(output, folder, store, run)


def _result(output: Path, folder: Path, store: Path, run: Run) -> _Result:
    grid, digest = run.plan.grid, run.identity.slide
    made_of = hashlib.sha256(json.dumps(run.identity.as_json(), sort_keys=True).encode()).hexdigest()
    slide, name = run.slide.path or Path(run.slide.name), folder.relative_to(output).as_posix()
    place = SlideFile(folder, slide, digest, title=f"{name}{slide.suffix}")
    familiarity = folder / FAMILIARITY if run.familiarity is not None else None
    probability = ProbabilityMap(
        store,
        run.classes,
        grid.size_out,
        grid.l0_per_out,
        (run.slide.bounds.width, run.slide.bounds.height),
        digest,
        familiarity if familiarity is not None and familiarity.is_file() else None,
    )
    kinds = {f"{one.name}*" for one in run.left_out if one.pieces}
    left_out = tuple(one for one in LEFT_OUT_CLASSES if one.name in kinds)
    return _Result(folder, name, place, made_of, probability, left_out, run.unfamiliar_warning)


def _load_classes(path: Path) -> dict[str, Any]:
    """Return the existing classes. Raises OutputError if they cannot be read."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(classes["pathClasses"], list):
            raise ValueError("pathClasses is not a list")
        _names(classes)
        json.dumps(classes, indent=2)  # nested too deeply, it could not be written
    except FileNotFoundError:
        return {"pathClasses": []}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(f"{path}: is not a list of classes that QuPath can read; move it away") from error
    return cast("dict[str, Any]", classes)


def _names(classes: Mapping[str, Any]) -> set[str]:
    return {entry.get("name") for entry in classes["pathClasses"]}


def _add_classes(classes: dict[str, Any], results: Sequence[_Result]) -> None:
    """Add the missing classes of the results. Existing classes stay unchanged."""
    known = _names(classes)
    for result in results:
        for one in (*result.map.classes, *result.left_out):
            if one.name not in known:
                known.add(one.name)
                classes["pathClasses"].append({"name": one.name, "color": packed_argb(one.color)})


def packed_argb(color: Color) -> int:
    """Return an opaque color as QuPath stores it: alpha, red, green and blue in a signed 32-bit number."""
    return int.from_bytes(bytes((255, *color)), "big", signed=True)


def _set_warning(entry: dict[str, Any], warning: str) -> None:
    """State the warning in the image's metadata, or remove that of a former result. Other metadata is the user's."""
    metadata = {key: value for key, value in (entry.get("metadata") or {}).items() if key != _WARNING}
    entry["metadata"] = metadata | ({_WARNING: warning} if warning else {})


def _drawn(folder: Path, results: Sequence[_Result], *, tiles: bool) -> Iterator[tuple[_Result, tuple[int, int]]]:
    """Write the pictures and tiles of the results. Yield each with (width, height) of its pictures in level-0 pixels.

    A result whose map cannot be read is left out with a warning.
    """
    for result in results:
        try:
            yield result, _draw(_maps(folder, result), result, tiles=tiles)
        except MapFileError as error:
            log.warning("%s: left out: %s", result.folder, error)
            shutil.rmtree(_maps(folder, result), ignore_errors=True)


def _draw(maps: Path, result: _Result, *, tiles: bool) -> tuple[int, int]:
    made = maps / "made_of.json"
    try:
        digest, width, height = json.loads(made.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        digest, width, height = "", 0, 0
    if digest != result.digest:
        # This also removes the tiles of a former result.
        shutil.rmtree(maps, ignore_errors=True)
        width, height = write_overlays(maps, result.map)
        write_atomically(made, json.dumps([result.digest, width, height]))
    if tiles and not _tiles_path(maps, result).exists():
        write_tiles(_tiles_path(maps, result), result.map)
    return width, height


def _maps(folder: Path, result: _Result) -> Path:
    return folder / "maps" / result.name


def _tiles_path(maps: Path, result: _Result) -> Path:
    return maps / f"{result.folder.name}.tiles.geojson"


def _row(folder: Path, entry: Mapping[str, Any], result: _Result, size_l0: tuple[int, int]) -> tuple[str, ...]:
    """Return the row of results.tsv of a result whose pictures have this (width, height)."""
    maps, (width, height) = _maps(folder, result), size_l0
    tiles_path = _tiles_path(maps, result)
    return (
        str(entry["entryID"]),
        _quoted(result.slide.title),
        _slide_cell(entry, folder),
        _relative(result.geojson, folder),
        _relative(result.left_out_geojson, folder) if result.left_out_geojson.exists() else "",
        _relative(tiles_path, folder) if tiles_path.exists() else "",
        _relative(maps, folder),
        str(width),
        str(height),
        ",".join(_quoted(one.name) for one in result.map.classes),
        _quoted(result.warning),
    )


def _slide_cell(entry: Mapping[str, Any], folder: Path) -> str:
    """Return the slide's path from the project's folder; empty if the image has several files."""
    files = files_of(entry)
    return _relative(files[0], folder) if len(files) == 1 else ""


def _relative(path: Path, folder: Path) -> str:
    return _quoted(os.path.relpath(path, folder), safe="/")


def _quoted(text: str, safe: str = "") -> str:
    return quote(os.fsencode(text), safe=safe)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
