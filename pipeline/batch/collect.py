"""The slides of a batch: files, folders and manifests, and slides whose results would have the same name."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from models.bundle import shipped_bundles
from pipeline.errors import ConfigError
from pipeline.workers.base import SlideJob
from wsi.readers import slide_suffixes

OWN_NAMES = frozenset({"index.html", "qupath", "summary.csv"})
"""Names that runs write beside the slides' folders."""


def collect_jobs(inputs: Sequence[Path], *, recursive: bool = False) -> list[SlideJob]:
    """Return a job for each slide: for each file, each slide of a folder, and each row of a CSV manifest.

    A manifest has a header with the column `slide`: a path, relative to the manifest. The columns `mpp` and `model` are
    optional; a model is the name of a shipped model, or the path of a bundle, relative to the manifest. A slide that
    occurs twice gets one job.

    Raises ConfigError if a folder contains no slide or a manifest cannot be used.
    """
    jobs: dict[str, SlideJob] = {}
    for path in inputs:
        for job in _expand(path, recursive=recursive):
            # Path.resolve raises if links form a loop.
            jobs.setdefault(os.path.realpath(job.path), job)
    return list(jobs.values())


def name_clashes(jobs: Iterable[SlideJob]) -> dict[Path, str]:
    """Return an error text for each slide whose result would replace another result or a file of the batch, by path."""
    groups: dict[str, list[Path]] = defaultdict(list)
    reserved: dict[Path, str] = {}
    for job in jobs:
        # Working folders and locks start with a dot; "." and ".." are existing folders.
        if job.path.stem.casefold() in OWN_NAMES or job.path.stem.startswith(".") or not job.path.stem:
            reserved[job.path] = (
                f"{job.path}: results are named after slides, and {job.path.stem!r} cannot be the name of a "
                f"result ({', '.join(sorted(OWN_NAMES))} and names that start with a dot are reserved); rename the "
                f"slide, or make a link to it with another name"
            )
        # Some file systems ignore case.
        groups[job.path.stem.casefold()].append(job.path)
    same = {
        path: f"{path}: has the same name as {_others(path, paths)}, and results are named after slides; rename one, "
        f"or use another --output for it"
        for paths in groups.values()
        if len(paths) > 1
        for path in paths
    }
    return same | reserved


def _others(path: Path, paths: Sequence[Path]) -> str:
    """Return the first few of the other paths: each of a thousand slides with the same name would list all others."""
    first = [str(other) for other in paths[:4] if other != path][:3]
    more = len(paths) - 1 - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _expand(path: Path, *, recursive: bool) -> Iterator[SlideJob]:
    if _is_dir(path):
        found = sorted(p for p in (path.rglob("*") if recursive else path.glob("*")) if _is_slide(p))
        if not found and path.suffix.lower() in slide_suffixes():
            found = [path]  # reported as a failed slide; the other slides continue
        if not found:
            hint = "" if recursive else "; pass --recursive to search its subfolders"
            raise ConfigError(f"{path}: no slides in this folder (endings: {' '.join(sorted(slide_suffixes()))}){hint}")
        yield from (SlideJob(p) for p in found)
    elif path.suffix.lower() == ".csv":
        yield from _read_manifest(path)
    else:
        yield SlideJob(path)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path") from error


def _is_slide(path: Path) -> bool:
    if path.suffix.lower() not in slide_suffixes() or path.name.startswith("."):
        return False
    try:
        return path.is_file()
    except OSError:
        return True  # a stale mount or no permission: reported as a failed slide; the other slides continue


def _read_manifest(path: Path) -> Iterator[SlideJob]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a manifest: {error}") from error
    if not rows or "slide" not in rows[0][1]:
        raise ConfigError(f"{path}: a manifest needs a header with a column 'slide' and at least one row below it")
    for number, row in rows:
        name = (row["slide"] or "").strip()
        if not name:
            raise ConfigError(f"{path}, line {number}: the column 'slide' is empty")
        if "\0" in name:
            raise ConfigError(
                f"{path}, line {number}: the column 'slide' contains a zero byte; file names cannot contain one"
            )
        text = (row.get("mpp") or "").strip()
        try:
            mpp = float(text) if text else None
        except ValueError:
            mpp = math.nan
        if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"{path}, line {number}: mpp is {text!r}; it must be a positive number, or empty")
        yield SlideJob(path.parent / name, mpp, _model(path, (row.get("model") or "").strip()))


def _model(manifest: Path, text: str) -> str | None:
    if not text or text in shipped_bundles():
        return text or None
    return str(manifest.parent / text)
