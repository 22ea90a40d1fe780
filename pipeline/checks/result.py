"""Rules for a results folder: every file that `run.json` lists exists and is readable by its programs.

The checks share no code with the writers on purpose. They read `run.json`, `summary.csv` and the files from scratch.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checks.geojson import broken_geojson_rules
from pipeline.checks.ome_zarr import broken_ome_zarr_rules
from pipeline.errors import ConfigError

# An error in summary.csv may be longer than the 131,072 characters that csv reads by default.
csv.field_size_limit(2**31 - 1)

Findings = dict[Path, list[str]]
"""The problems of each checked file or folder; an empty list means that all rules hold."""


def broken_rules(path: Path) -> Findings:
    """Check a folder of results, one slide's result, an OME-Zarr store, or a GeoJSON file.

    Raises ConfigError for any other path.
    """
    if path.suffix in {".geojson", ".json"} and path.is_file():
        return {path: _geojson(path)[1]}
    if path.suffix == ".zarr" and path.is_dir():
        return {path: broken_ome_zarr_rules(path)}
    if (path / "run.json").is_file():
        return _result(path)
    slides = sorted(run.parent for run in path.glob("*/run.json") if not run.parent.name.startswith("."))
    if not slides:
        what = "cannot be checked" if path.exists() else "does not exist"
        raise ConfigError(
            f"{path}: {what}; pass a results folder, the folder of one slide, a .ome.zarr store or a .geojson file"
        )
    found: Findings = {}
    for slide in slides:
        found |= _result(slide)
    for tiles in sorted(path.glob("qupath/maps/*/*.geojson")):
        found[tiles] = _geojson(tiles)[1]
    return found | _summary(path / "summary.csv", {slide.name for slide in slides})


def _result(folder: Path) -> Findings:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        outputs, polygons = [str(name) for name in run["outputs"]], run["polygons"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return {folder / "run.json": [f"does not list the outputs of the result ({error})"]}
    wrong = [f"{name} is missing" for name in outputs if not (folder / name).exists()]
    found: Findings = {folder / "run.json": wrong}
    for name in outputs:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".zarr":
            found[path] = broken_ome_zarr_rules(path)
        elif path.suffix == ".geojson":
            count, found[path] = _geojson(path)
            if not name.endswith(".left-out.geojson"):
                found[path] += _other_count(count, polygons, "features")
        elif path.suffix == ".parquet":
            found[path] = _parquet(path, polygons)
        elif path.stat().st_size == 0:
            found[path] = ["is empty"]
    return found


def _geojson(path: Path) -> tuple[int, list[str]]:
    try:
        return broken_geojson_rules(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        return 0, [f"cannot be read: {error}"]


def _parquet(path: Path, polygons: Any) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            names, rows = set(file.schema_arrow.names), file.metadata.num_rows
            geo = b"geo" in (file.schema_arrow.metadata or {})
    except (OSError, pa.ArrowException) as error:
        return [f"cannot be read: {error}"]
    missing = sorted({"id", "class", "label", "area_mm2", "geometry"} - names)
    wrong = [f"lacks the columns {', '.join(missing)}"] if missing else []
    return wrong + ([] if geo else ["has no GeoParquet metadata"]) + _other_count(rows, polygons, "rows")


def _other_count(count: int, polygons: Any, what: str) -> list[str]:
    return [] if count == polygons else [f"has {count} {what}, but run.json has {polygons} polygons"]


def _summary(path: Path, slides: set[str]) -> Findings:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(row["slide"], row["status"]) for row in csv.DictReader(file)]
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
