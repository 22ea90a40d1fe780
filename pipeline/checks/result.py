"""Rules for a results folder: every file is the one that the run wrote, and is readable by its programs.

The checks share no code with the writers on purpose. They read `run.json`, `summary.csv` and the files from scratch.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checks.digests import changed_files, changed_values
from pipeline.checks.geojson import broken_geojson_rules
from pipeline.checks.ome_zarr import broken_ome_zarr_rules
from pipeline.errors import ConfigError

# An error in summary.csv may be longer than the 131,072 characters that csv reads by default.
csv.field_size_limit(2**31 - 1)

Findings = dict[Path, list[str]]
"""The problems of each checked file or folder; an empty list means that all rules hold."""


def broken_rules(path: Path, *, quick: bool = False) -> Findings:
    """Check a folder of results, one slide's result, an OME-Zarr store, or a GeoJSON file.

    `quick`: of each result, check only the presence and the sizes of the files, and of a folder also `summary.csv`.
    Raises ConfigError for any other path.
    """
    try:
        (path / "run.json" if path.is_dir() else path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if path.suffix in {".geojson", ".json"} and path.is_file():
        return {path: _geojson(path)[1]}
    if path.suffix == ".zarr" and path.is_dir():
        return {path: broken_ome_zarr_rules(path)}
    if (path / "run.json").is_file():
        return _result(path, quick=quick)
    slides = sorted(_results(path)) if path.exists() else []
    if not slides:
        what = "cannot be checked" if path.exists() else "does not exist"
        raise ConfigError(
            f"{path}: {what}; pass a results folder, the folder of one slide, a .ome.zarr store or a .geojson file"
        )
    found: Findings = {}
    for slide in slides:
        found |= _result(slide, quick=quick)
    for tiles in [] if quick else sorted(path.glob("qupath/maps/**/*.geojson")):
        if tiles.is_file():  # the name of a slide's folder can end like that of a file
            found[tiles] = _geojson(tiles)[1]
    # The table has escapes for bytes of names that are not UTF-8.
    names = {slide.relative_to(path).as_posix().encode("utf-8", "backslashreplace").decode() for slide in slides}
    return found | _summary(path / "summary.csv", names)


def _results(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the results in a folder and in the folders of results below it, which hold an empty `.wsi-segment`.

    A link to one of the folders `above`, given by device and inode, is not followed.
    """
    facts = folder.stat()
    if (facts.st_dev, facts.st_ino) in above:
        return
    above |= {(facts.st_dev, facts.st_ino)}
    for run in folder.glob("*/run.json"):
        if not run.parent.name.startswith("."):
            yield run.parent
    for mark in folder.glob("*/.wsi-segment"):
        yield from _results(mark.parent, above)


def _result(folder: Path, *, quick: bool) -> Findings:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        outputs, polygons, areas_mm2 = [str(name) for name in run["outputs"]], run["polygons"], run["class_areas_mm2"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return {folder / "run.json": [f"does not list the outputs of the result ({error})"]}
    found: Findings = {folder / "run.json": changed_values(run)}
    try:
        found |= changed_files(folder, run, quick=quick)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        found[folder / "run.json"].append(f"does not have the digests of the files ({error!r})")
    if not quick:
        for name in outputs:
            if _exists(folder / name):
                found[folder / name] = _broken_format(folder / name, polygons, areas_mm2) + found.get(folder / name, [])
        left_out = folder / "left-out.geojson"
        if not found.get(left_out, ["is not an output"]):
            found[left_out] = _other_left_out(left_out, run.get("left_out"))
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _other_left_out(path: Path, left_out: Any) -> list[str]:
    """Compare the number of areas of each kind with run.json.

    A polygon ends at the edge of the slide, which can split or erase a few.
    """
    names = [
        feature["properties"]["classification"]["name"]
        for feature in json.loads(path.read_text(encoding="utf-8"))["features"]
    ]
    counts = Counter(name.removesuffix("*") for name in names)
    try:
        stated = {str(one["name"]): int(one["pieces"]) for one in left_out}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        return [f"cannot be compared with run.json, whose left_out is damaged ({error!r})"]
    return [
        f"has {counts[name]} areas of {name}, but run.json has {stated.get(name, 0)}"
        for name in sorted(counts.keys() | stated.keys())
        # One area and 5 %, in whole numbers: a float cannot hold every number of a damaged file.
        if 20 * abs(counts[name] - stated.get(name, 0)) > (20 + stated[name] if stated.get(name) else 0)
    ]


def _broken_format(path: Path, polygons: Any, areas_mm2: Any) -> list[str]:
    if path.suffix == ".zarr":
        return broken_ome_zarr_rules(path)
    if path.suffix == ".geojson":
        count, broken = _geojson(path)
        # Results of earlier versions can have this name: their polygons were overwritten by the left-out areas.
        if path.name == "left-out.geojson" and not path.with_suffix(".parquet").exists():
            return broken
        return broken + _other_count(count, polygons, "features")
    if path.suffix == ".parquet":
        return _parquet(path, polygons, areas_mm2)
    return ["is empty"] if path.is_file() and path.stat().st_size == 0 else []


def _geojson(path: Path) -> tuple[int, list[str]]:
    try:
        return broken_geojson_rules(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        return 0, [f"cannot be read: {error}"]


def _parquet(path: Path, polygons: Any, areas_mm2: Any) -> list[str]:
    try:
        with path.open("rb") as binary, pq.ParquetFile(binary) as file:
            names, rows = set(file.schema_arrow.names), file.metadata.num_rows
            geo = b"geo" in (file.schema_arrow.metadata or {})
            table = file.read(["class", "area_mm2"]) if {"class", "area_mm2"} <= names else None
    except (OSError, pa.ArrowException) as error:
        return [f"cannot be read: {error}"]
    missing = sorted({"id", "class", "label", "area_mm2", "geometry"} - names)
    wrong = [f"lacks the columns {', '.join(missing)}"] if missing else []
    wrong += [] if geo else ["has no GeoParquet metadata"]
    return wrong + _other_count(rows, polygons, "rows") + ([] if table is None else _other_areas(table, areas_mm2))


def _other_areas(table: pa.Table, areas_mm2: Any) -> list[str]:
    """Compare the sum of the polygons of each class with the area in run.json, up to 1 µm² and a billionth."""
    if not (pa.types.is_string(table["class"].type) and pa.types.is_floating(table["area_mm2"].type)):
        return ["has classes that are not text, or areas that are not numbers"]
    sums_mm2: dict[str, float] = {}
    for name, area_mm2 in zip(table["class"].to_pylist(), table["area_mm2"].to_pylist(), strict=True):
        sums_mm2[name or ""] = sums_mm2.get(name or "", 0.0) + (area_mm2 or 0.0)
    stated_mm2 = areas_mm2 if isinstance(areas_mm2, dict) else {}
    wrong = []
    for name in sorted(set(sums_mm2) | set(stated_mm2)):
        found, stated = sums_mm2.get(name, 0.0), stated_mm2.get(name)
        # A float cannot hold every whole number of a damaged file.
        number = stated if isinstance(stated, (int, float)) and abs(stated) < 1e300 else math.nan
        if not math.isclose(found, number, rel_tol=1e-9, abs_tol=1e-6):
            wrong.append(f"has {found:g} mm² of {name}, but run.json has {stated}")
    return wrong


def _other_count(count: int, polygons: Any, what: str) -> list[str]:
    return [] if count == polygons else [f"has {count} {what}, but run.json has {polygons} polygons"]


def _summary(path: Path, slides: set[str]) -> Findings:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # A quotation mark keeps spreadsheets from computing names such as =1+1.
            rows = [(re.sub(r"^'(?='*[=+\-@\t\r])", "", row["slide"]), row["status"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return {}  # slides segmented by separate commands have no summary
    except (OSError, UnicodeDecodeError, csv.Error, LookupError) as error:
        return {path: [f"is not a summary of results: {error}"]}
    return {
        path: [
            f"{name} is {status} but has no result"
            for name, status in rows
            if status != "failed" and name not in slides
        ]
    }
