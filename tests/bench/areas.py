"""Compare the areas of the classes in the files of a result, for docs/benchmarks/edges.md.

    python -m tests.bench.areas RESULT

It prints, for each class, the area in mm² that the report shows (`class_areas_mm2` in `run.json`), that of the polygons
in the GeoJSON file and in the GeoParquet file, and that of the label image (`label_areas_mm2` in `run.json`) with the
difference from the report in percent. Then it prints the sums over the classes and the area of the tissue.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import shapely.geometry

from pipeline.formats.features import read_features
from pipeline.results.names import GEOJSON_END, GEOPARQUET_END
from pipeline.results.record import Run, read_run


class Areas(NamedTuple):
    """The area of one class in mm², by file."""

    report: float
    geojson: float
    parquet: float
    labels: float

    @property
    def difference(self) -> float | None:
        """Return the relative difference of the label image from the report; None if the report has no area."""
        return self.labels / self.report - 1 if self.report else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the areas of a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="folder of a result, such as results/CMU-1")
    print_areas(parser.parse_args(arguments).result.resolve())


def print_areas(result: Path) -> None:
    """Print the table of a result. Raises SystemExit if the folder has no result with these areas."""
    run = read_run(result)
    if run is None or not run.label_areas_mm2:
        raise SystemExit(f"{result}: not a result of wsi-segment with the areas of the label image")
    found = areas_by_class(result, run)
    total = Areas(*map(sum, zip(*found.values(), strict=True)))
    print(f"{result.name}, {run.model}, mm²: report, GeoJSON, GeoParquet, label image (difference from the report)")
    for name, areas in (found | {"sum": total}).items():
        figures = ", ".join(f"{area:.4f}" for area in areas)
        difference = "no polygons" if areas.difference is None else f"{areas.difference:+z.1%}"
        print(f"{name}: {figures} ({difference})")
    print(f"tissue: {run.tissue_mm2:.4f}")


def areas_by_class(result: Path, run: Run) -> dict[str, Areas]:
    """Return the areas of each class of a result, in the order of its classes."""
    geojson, parquet = geojson_areas_mm2(result, run), parquet_areas_mm2(result, run)
    return {
        one.name: Areas(
            run.class_areas_mm2[one.name], geojson[one.name], parquet[one.name], run.label_areas_mm2[one.name]
        )
        for one in run.classes
    }


def geojson_areas_mm2(result: Path, run: Run) -> dict[str, float]:
    """Return the area of each class by the coordinates of the GeoJSON file."""
    areas = dict.fromkeys((one.name for one in run.classes), 0.0)
    for feature in json.loads((result / f"{result.name}{GEOJSON_END}").read_text(encoding="utf-8"))["features"]:
        name = feature["properties"]["classification"]["name"]
        areas[name] += shapely.geometry.shape(feature["geometry"]).area * run.slide.mpp**2 / 1e6
    return areas


def parquet_areas_mm2(result: Path, run: Run) -> dict[str, float]:
    """Return the area of each class by the coordinates of the GeoParquet file."""
    areas = dict.fromkeys((one.name for one in run.classes), 0.0)
    for feature in read_features(result / f"{result.name}{GEOPARQUET_END}", run.classes):
        areas[feature.tissue_class.name] += feature.geometry_l0.area * run.slide.mpp**2 / 1e6
    return areas


if __name__ == "__main__":
    main()
