"""The slides of a batch: files, folders and manifests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.batch.dicom_jobs import DicomFolders, place_below, series_job
from pipeline.batch.manifest import read_manifest
from pipeline.errors import ConfigError
from pipeline.files import FirstPaths, local_path, name_key
from pipeline.workers.base import SlideJob
from wsi.dicom import group_series, is_dicom
from wsi.paths import kind_of
from wsi.readers import slide_suffixes

log = logging.getLogger(__name__)

UNREAD_ENDINGS = frozenset({".vsi", ".qptiff", ".isyntax", ".jp2"})
"""Endings of slide formats that no reader has."""


def collect_jobs(inputs: Sequence[Path], *, recursive: bool = False) -> list[SlideJob]:
    """Return a job for each slide: for each file, each slide of a folder, and each row of a CSV manifest.

    A DICOM series is one slide. A slide that is listed twice gets one job. What looks like a slide and is not one, such
    as a broken link, and a folder that cannot be searched get a job with a `problem`, so nothing that was listed
    disappears. A warning counts slides in formats that cannot be read, which get no job.

    Raises ConfigError if a folder contains no slide, a manifest cannot be used, a slide is listed twice with different
    settings, or two slides have the same id.
    """
    jobs: dict[Path, SlideJob] = {}
    first_paths = FirstPaths()
    ids: dict[str, SlideJob] = {}
    found = DicomFolders()
    unread: set[Path] = set()
    for path in inputs:
        for job in _expand(local_path(path, "slides"), found, unread, recursive=recursive):
            # Links that lead nowhere are different slides.
            former = jobs.setdefault(job.path.absolute() if job.problem else first_paths.of(job.path), job)
            if former != replace(job, path=former.path):
                raise ConfigError(
                    f"{job.path}: is listed twice, {_settings(former)} and {_settings(job)}; list it once, or "
                    f"twice with the same settings"
                )
            # Only a manifest gives a name that cannot change. A DICOM series has a place, too.
            if job.name is not None and job.place is None:
                other = ids.setdefault(name_key(job.name), former)
                if other is not former:
                    raise ConfigError(
                        f"{job.path}: its id {job.name!r} is also that of {other.path}; ids name the results, so each "
                        f"slide needs its own"
                    )
    if unread:
        log.warning(
            "files skipped because their extension is not that of a readable slide format: %d, such as %s; convert "
            "them to TIFF",
            len(unread), min(unread).name,
        )  # fmt: skip
    return list(jobs.values())


def _settings(job: SlideJob) -> str:
    named = {"mpp": job.mpp, "model": job.model, "id": job.name}
    texts = [f"with {name} {value}" for name, value in named.items() if value is not None]
    return " and ".join(texts) or "without settings"


def _expand(path: Path, dicom: DicomFolders, unread: set[Path], *, recursive: bool) -> Iterator[SlideJob]:
    if _is_dir(path):
        found = sorted(_search(path, unread, recursive=recursive), key=lambda job: job.path)
        if not found and path.suffix.lower() in slide_suffixes():
            found = [SlideJob(path)]  # reported as a failed slide; the other slides continue
        if not found:
            hint = "" if recursive else "; pass --recursive to search its subfolders"
            raise ConfigError(f"{path}: no slides in this folder (endings: {' '.join(sorted(slide_suffixes()))}){hint}")
        yield from found
    elif path.suffix.lower() == ".csv":
        yield from (dicom.whole_series(job) for job in read_manifest(path))
    else:
        yield dicom.whole_series(SlideJob(path))


def _is_dir(path: Path) -> bool:
    try:
        return kind_of(path) == "folder"
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path") from error


def _search(root: Path, unread: set[Path], *, recursive: bool) -> Iterator[SlideJob]:
    """Yield a job for each slide in a folder, and add the slides in other formats beside them to `unread`.

    Linked folders are searched too, and each folder once.
    """
    folders, searched = [root], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in searched:
                continue
            searched.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as entries:
                content = [(folder / entry.name, _leads_to_folder(entry)) for entry in entries]
        except OSError as error:
            if folder == root:
                reason = error.strerror or error
                raise ConfigError(f"{root}: cannot be searched: {reason}; check the permissions") from error
            yield _unsearched(folder, root, error)
            continue
        if recursive:
            # Stores of results hold thousands of folders and no slides.
            inner = [path for path, is_folder in content if is_folder and path.suffix != ".zarr"]
            # Sorted: of a folder with several links, the same one is searched in every run.
            folders += sorted(inner, reverse=True)
        files = [path for path, is_folder in content if not is_folder]
        slides = list(_slides(files, folder, root))
        if slides:
            unread.update(_unread(files))
        yield from slides


def _slides(files: Sequence[Path], folder: Path, root: Path) -> Iterator[SlideJob]:
    visible = [path for path in files if not path.name.startswith(".")]
    dicom = [path for path in visible if is_dicom(path)]
    all_series, unreadable = group_series(dicom)
    for series in all_series:
        yield series_job(series, folder, root, all_series)
    for path in [*unreadable, *(p for p in visible if p.suffix.lower() in slide_suffixes() - {".dcm"})]:
        yield SlideJob(path, place=place_below(root, path), problem=_problem(path))


def _unread(files: Sequence[Path]) -> Iterator[Path]:
    """Yield the visible slides in formats that no reader has, unless a slide beside them was converted from them.

    Plain pictures (.jpg, .png) do not count: beside slides, they are thumbnails, labels and overviews.
    """
    names = {path.name for path in files}
    for path in files:
        if path.suffix.lower() in UNREAD_ENDINGS and not path.name.startswith("."):
            converted = {path.stem + ending for ending in (".tif", ".tiff", ".ome.tif", ".ome.tiff")}
            if names.isdisjoint(converted):
                yield path


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a stale mount or no permission: reported as a failed slide; the other slides continue


def _problem(path: Path) -> str:
    """Return why an entry that is named like a slide cannot be one; an empty text if the attempt will tell."""
    try:
        kind = kind_of(path)
        if kind == "file":
            return ""
        if kind is None and path.is_symlink():
            return f"{path}: is a link to {path.readlink()}, which does not exist; restore the file, or remove the link"
    except OSError:
        return ""  # a stale mount or no permission, which the attempt reports or retries
    return f"{path}: is not a regular file; remove it, or give it another ending"


def _unsearched(folder: Path, root: Path, error: OSError) -> SlideJob:
    return SlideJob(
        folder,
        name=f"{folder.relative_to(root).as_posix()}/",
        problem=f"{folder}: cannot be searched for slides: {error.strerror or error}; check the permissions",
    )
