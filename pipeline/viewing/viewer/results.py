"""Finds the results that the viewer shows and reads their records."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.errors import RunRecordError, ViewError
from pipeline.files import is_file
from pipeline.results.areas import ClassArea, class_areas
from pipeline.results.find import result_folders, result_name
from pipeline.results.names import FAMILIARITY, GEOPARQUET_END, LEFT_OUT, MAP_END, RUN, THUMBNAIL
from pipeline.results.record import Run, read_run
from wsi.paths import kind_of

log = logging.getLogger(__name__)


FileStamp = tuple[int, int]
"""The modification time in nanoseconds and the size of a file."""


@dataclass(frozen=True)
class Result:
    """A slide's result that can be shown. Immutable; holds nothing open."""

    id: str
    """Identifies the result in addresses. Depends only on its name."""
    name: str
    """The path of the result below the folder that is shown, as people read it."""
    folder: Path
    run: Run
    slide: Path
    """The expected place of the slide."""
    store: Path
    """The OME-Zarr map."""
    outlines: Path
    """The GeoParquet file."""
    stamp: FileStamp | None
    """The stamp of the record when it was read."""
    slide_stamp: FileStamp | None
    """The stamp of the slide when the result was loaded; None if the slide could not be found or examined."""

    @cached_property
    def version(self) -> str:
        """Identify the result with its folder, its record and its slide.

        The id depends only on the name. After a restart, another result can have the same id, so each page requests
        the data of its own version.
        """
        return hashlib.sha256(repr(self).encode()).hexdigest()[:20]

    @property
    def familiarity(self) -> Path | None:
        """Return the picture of the tissue unlike the training data, or None if there is none."""
        file = self.folder / FAMILIARITY
        return file if self.run.familiarity is not None and is_file(file) else None

    @property
    def thumbnail(self) -> Path | None:
        """Return the picture of the slide with its classes, or None if there is none."""
        file = self.folder / THUMBNAIL
        return file if is_file(file) else None

    @property
    def left_out(self) -> Path | None:
        """Return the file of the areas beside plain tissue, or None if the slide has none or the result is older."""
        file = self.folder / LEFT_OUT
        return file if any(one.pieces for one in self.run.left_out) and is_file(file) else None

    @property
    def classes(self) -> list[ClassArea]:
        """Return the classes with their areas. Class k has channel k and label k + 1."""
        return class_areas(self.run.class_areas_mm2, self.run.classes)


def find_results(path: Path) -> tuple[Result, ...]:
    """Return the result at `path`, or the complete results in that folder, by name.

    Incomplete results are left out with a warning. Raises ViewError if no result is complete.
    """
    with examined(path):
        if kind_of(path) != "folder":
            raise ViewError(f"{path}: no such folder; pass the folder of a result, or a folder of results")
        if kind_of(path / RUN) == "file":
            return (load_result(path),)
        folders = result_folders(path)
        results = tuple(_loadable(path, folders))
    if folders and not results:
        raise ViewError(f"{path}: contains no readable results; the warnings above give the reasons")
    if not results:
        raise ViewError(f"{path}: contains no results; make one with wsi-segment -o {path}")
    return results


@contextmanager
def examined(path: Path) -> Iterator[None]:
    """Raise ViewError for an OSError of the block, which examines `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ViewError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error


def _loadable(output: Path, folders: Iterable[Path]) -> Iterator[Result]:
    for folder in folders:
        try:
            yield load_result(folder, result_name(output, folder))
        except ViewError as error:
            log.warning("left out: %s", error)


def load_result(folder: Path, name: str | None = None) -> Result:
    """Return the result in a folder. `name` is shown; None: the folder's own name.

    Raises ViewError if its record is damaged or its map or polygons are missing.
    """
    folder = folder.resolve()
    name = result_name(folder.parent, folder) if name is None else name
    # Before the record: if the result is replaced meanwhile, the stamp is that of the earlier one.
    stamp = record_stamp(folder)
    try:
        run = read_run(folder)
    except RunRecordError as error:
        raise ViewError(str(error)) from error
    if run is None:
        raise ViewError(
            f"{folder}: its {RUN} is damaged or was written by another program; if this is the result of a slide, move "
            f"the folder away and segment the slide again"
        )
    # The path may have been removed from the record. Then look for the slide beside the results.
    slide = run.slide.path or folder.parent / run.slide.name
    return Result(
        id=hashlib.sha256(name.encode()).hexdigest()[:10],
        name=name,
        folder=folder,
        run=run,
        slide=slide,
        store=_output(folder, run, MAP_END),
        outlines=_output(folder, run, GEOPARQUET_END),
        stamp=stamp,
        slide_stamp=slide_file_stamp(slide),
    )


def record_stamp(folder: Path) -> FileStamp | None:
    """Return the stamp of a result's record; None without a record. Raises OSError if the folder cannot be read."""
    try:
        return _stamp(folder / RUN)
    except FileNotFoundError:
        return None


def slide_file_stamp(slide: Path) -> FileStamp | None:
    """Return the stamp of a slide's file, or None if it cannot be found or examined.

    If the slide has several files, this is the stamp of the one that is opened: it is read before every answer.
    """
    try:
        return _stamp(slide)
    except (OSError, ValueError):  # ValueError: the path contains a null character
        return None


def _stamp(path: Path) -> FileStamp:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


def with_slide(result: Result, moved: Path) -> Result:
    """Return the result with its slide at `moved`: a file, or a folder that holds the slide under its old name.

    Raises ViewError if `moved` cannot be examined.
    """
    with examined(moved):
        slide = moved / result.slide.name if kind_of(moved) == "folder" else moved
    return replace(result, slide=slide, slide_stamp=slide_file_stamp(slide))


def _output(folder: Path, run: Run, end: str) -> Path:
    found = [folder / name for name in run.outputs if name.endswith(end)]
    if not found or not found[0].exists():
        raise ViewError(f"{folder}: its {end} is missing; segment the slide again with --force")
    return found[0]
