"""CSV manifests: a table of slides with the settings of each."""

from __future__ import annotations

import csv
import difflib
import math
import unicodedata
from dataclasses import replace
from pathlib import Path, PurePath

from models.bundle import load_bundle, shipped_bundles
from models.errors import ModelError
from pipeline.batch.names import UNUSABLE, reserved_part
from pipeline.errors import ConfigError
from pipeline.files import FirstPaths, local_path, name_key
from pipeline.workers.base import SlideJob

COLUMNS = ("slide", "mpp", "model", "id")
"""`slide` is a path relative to the manifest, `model` a shipped name or a path relative to the manifest, and `id` the
name of the result."""

IGNORED = "#"
"""A column whose name begins with this sign is not read."""


def read_manifest(path: Path) -> list[SlideJob]:
    """Return a job for each row; a slide that occurs twice with the same settings gives one job.

    The header has the column `slide` and any of the other `COLUMNS`, in any order. Empty cells leave a setting to the
    run. Raises ConfigError with the line and the column of the first value that cannot be used.
    """
    header, rows = _table(path)
    jobs: dict[Path, tuple[int, SlideJob]] = {}
    first_paths = FirstPaths()
    ids: dict[str, int] = {}
    for number, cells in rows:
        if len(cells) > len(header):
            raise ConfigError(
                f"{path}, line {number}: has {len(cells)} cells, but the header has {len(header)}; put quotation marks "
                f"around values with commas, and write numbers with a point"
            )
        row = dict.fromkeys(header, "") | {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        job = _job(f"{path}, line {number}", path, row)
        line, former = jobs.setdefault(first_paths.of(job.path), (number, job))
        if former != replace(job, path=former.path):
            raise ConfigError(
                f"{path}, line {number}: {row['slide']} is also in line {line}, with another mpp, model or id; keep "
                f"one of the lines"
            )
        if job.name is not None and ids.setdefault(name_key(job.name), line) != line:
            raise ConfigError(
                f"{path}, line {number}: the id {job.name!r} is also in line {ids[name_key(job.name)]}; ids name the "
                f"results, so each slide needs its own"
            )
    return [job for _, job in jobs.values()]


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the names of the columns, and each row with its line number. Empty lines are left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a manifest: {error}") from error
    if not lines:
        raise ConfigError(f"{path}: is empty; {_NEEDS}")
    header = [name.strip() for name in lines[0][1]]
    for place, name in enumerate(header, start=1):
        if name not in COLUMNS and not name.startswith(IGNORED):
            raise ConfigError(f"{path}, line {lines[0][0]}, column {place}: {name!r} is not a column; {_hint(name)}")
        if name in COLUMNS and name in header[: place - 1]:
            raise ConfigError(f"{path}, line {lines[0][0]}, column {place}: {name!r} occurs twice; remove one of them")
    if "slide" not in header or len(lines) == 1:
        raise ConfigError(f"{path}: {_NEEDS}")
    return header, lines[1:]


_NEEDS = "a manifest needs a header with a column 'slide' and at least one row below it"


def _hint(name: str) -> str:
    if ";" in name or "\t" in name:
        return "separate the columns with commas"
    close = difflib.get_close_matches(name.casefold(), COLUMNS, 1)
    allowed = f"a manifest has the columns {', '.join(COLUMNS)}"
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}{allowed}; put {IGNORED} before the name of a column that is not for wsi-segment"


def _job(where: str, manifest: Path, row: dict[str, str]) -> SlideJob:
    name = row["slide"]
    if not name:
        raise ConfigError(f"{where}: the column 'slide' is empty")
    if "\0" in name:
        raise ConfigError(f"{where}: the column 'slide' contains a zero byte; file names cannot contain one")
    if not PurePath(name).name:
        raise ConfigError(f"{where}: the column 'slide' is {name!r}, which is a folder; it must name a slide")
    slide = manifest.parent / local_path(name, f"{where}: the slide")
    id_ = _id(where, row.get("id", ""))
    if id_ is None and slide.stem == ".":
        raise ConfigError(
            f"{where}: the column 'slide' is {name!r}; results are named after slides, and '.' cannot be the name of a "
            f"result; rename the slide, or name its result in the column 'id'"
        )
    return SlideJob(
        slide,
        _mpp(where, row.get("mpp", "")),
        _model(where, manifest, row.get("model", "")),
        id_,
        place=_place(name) if id_ is None else None,
    )


def _mpp(where: str, text: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not (math.isfinite(mpp) and mpp > 0):
        raise ConfigError(f"{where}: mpp is {text!r}; it must be a positive number, or empty")
    return mpp


def _model(where: str, manifest: Path, text: str) -> str | None:
    if not text:
        return None
    shipped = text in shipped_bundles()
    model = text if shipped else str(manifest.parent / local_path(text, f"{where}: the model"))
    try:
        load_bundle(model)
    except ModelError as error:
        raise ConfigError(f"{where}: the column 'model' cannot be used: {error}") from error
    return model


def _id(where: str, text: str) -> str | None:
    if not text:
        return None
    if reserved_part(text) is not None or any(unicodedata.category(one) == "Cc" for one in text):
        raise ConfigError(
            f"{where}: id is {text!r}; it must be a name or a path with slashes, without empty parts and without "
            f"control characters ({UNUSABLE} are reserved)"
        )
    return text


def _place(name: str) -> str | None:
    """Return where a slide lies below its manifest; None if it lies elsewhere."""
    path = PurePath(name)
    return None if path.is_absolute() or ".." in path.parts else path.with_name(path.stem).as_posix()
