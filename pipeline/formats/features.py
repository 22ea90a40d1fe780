"""Write regions as GeoJSON in QuPath's dialect and as GeoParquet, feature by feature, with the same coordinates.

QuPath rejects a whole file for one bad feature. Every geometry is therefore rounded to QuPath's grid, then checked and
repaired. Coordinates are level-0 pixels from the corner of the slide's bounds, y down: QuPath's frame.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from models.tissue_class import TissueClass
from pipeline.formats.polygons import Region

GRID_L0 = 0.01
"""QuPath rounds coordinates to this many level-0 pixels."""

_BATCH = 1024  # regions converted at once and rows of a row group; this bounds the memory
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "wsi-segment/feature")
_GEO = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {
        "geometry": {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "crs": None,
            "edges": "planar",
            "orientation": "counterclockwise",
        }
    },
}
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("area_mm2", pa.float64(), nullable=False),
        pa.field("geometry", pa.binary(), nullable=False),
    ],
    metadata={"geo": json.dumps(_GEO)},
)


@dataclass(frozen=True)
class Feature:
    """One connected region as it is published."""

    id: str
    """UUID of the slide digest, the class and the geometry: the same region always has the same id."""
    label: int
    tissue_class: TissueClass
    area_mm2: float
    geometry_l0: shapely.Polygon
    """On the 0.01 px grid, valid, with a counterclockwise shell (RFC 7946)."""


def write_features(
    geojson_path: Path,
    parquet_path: Path,
    regions: Iterable[Region],
    classes: Sequence[TissueClass],
    l0_per_out: float,
    size_l0: tuple[int, int],
    mpp_l0: float,
    slide_digest: str,
) -> None:
    """Write all regions to one GeoJSON and one GeoParquet file, in the order given.

    classes: the classes of labels 1, 2, …; l0_per_out: level-0 pixels per out pixel; size_l0: (width, height) of the
    slide's bounds, which no region passes; mpp_l0: micrometers per level-0 pixel. Memory does not grow with the number
    of regions; no regions give two valid empty files.
    Raises ValueError for equal class names, for a scale that is not a positive number, and for a label without a class.
    """
    _check(classes, l0_per_out, mpp_l0)
    count = 0
    features = region_features(regions, classes, l0_per_out, size_l0, mpp_l0, slide_digest)
    with (
        geojson_path.open("w", encoding="utf-8", newline="\n") as geojson,
        parquet_path.open("wb") as file,  # Arrow does not open names that are not UTF-8
        pq.ParquetWriter(file, _SCHEMA, compression="zstd") as parquet,
    ):
        geojson.write('{"type":"FeatureCollection","features":[')
        while batch := list(itertools.islice(features, _BATCH)):
            for feature in batch:
                geojson.write(",\n" if count else "\n")
                geojson.write(_dumps(geojson_feature(feature)))
                count += 1
            parquet.write_table(_table(batch))
        geojson.write("\n]}\n")


def measure_features(parquet_path: Path, classes: Sequence[TissueClass]) -> tuple[int, dict[str, float]]:
    """Return the number of features in a GeoParquet file of `write_features`, and the area of each class in mm²."""
    with parquet_path.open("rb") as file, pq.ParquetFile(file) as parquet:
        table = parquet.read(["label", "area_mm2"], use_threads=False)
    label_N, area_mm2_N = table["label"].to_numpy(), table["area_mm2"].to_numpy()
    sums_mm2 = np.bincount(label_N, area_mm2_N, minlength=len(classes) + 1).tolist()
    return len(table), {one.name: sums_mm2[label] for label, one in enumerate(classes, start=1)}


def feature_ids(parquet_path: Path) -> list[str]:
    """Return the ids of the features in a file that `write_features` has written, in their order.

    Raises OSError if the file cannot be read.
    """
    with _opened(parquet_path) as file:
        ids: list[str] = file.read(columns=["id"])["id"].to_pylist()
    return ids


def read_features(parquet_path: Path, classes: Sequence[TissueClass]) -> Iterator[Feature]:
    """Yield the features of a file that `write_features` has written, in their order. `classes` are those of the run.

    Raises OSError if the file cannot be read.
    """
    with _opened(parquet_path) as file:
        for batch in file.iter_batches(_BATCH, columns=["id", "label", "area_mm2", "geometry"]):
            columns = batch.to_pydict()
            geometries = shapely.from_wkb(columns["geometry"])
            rows = zip(columns["id"], columns["label"], columns["area_mm2"], geometries, strict=True)
            for id_, label, area_mm2, geometry in rows:
                yield Feature(id_, label, classes[label - 1], area_mm2, geometry)


@contextmanager
def _opened(parquet_path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with parquet_path.open("rb") as binary, pq.ParquetFile(binary) as file:
            yield file
    except (pa.ArrowException, shapely.errors.ShapelyError, LookupError, TypeError, ValueError) as error:
        raise OSError(f"{parquet_path.name}: cannot be read: {error}") from error


def region_features(
    regions: Iterable[Region],
    classes: Sequence[TissueClass],
    l0_per_out: float,
    size_l0: tuple[int, int],
    mpp_l0: float,
    slide_digest: str,
) -> Iterator[Feature]:
    """Yield the features of the regions in their order. Rounding can split a region into several, or erase it."""
    stream = iter(regions)
    while batch := list(itertools.islice(stream, _BATCH)):
        geometries_out = [region.geometry_out for region in batch]
        for region, polygons_l0 in zip(batch, _on_grid(geometries_out, l0_per_out, size_l0), strict=True):
            if not 1 <= region.label <= len(classes):
                raise ValueError(f"a region has label {region.label}, but the classes are 1 to {len(classes)}")
            tissue_class = classes[region.label - 1]
            for polygon_l0 in polygons_l0:
                area_mm2 = polygon_l0.area * (mpp_l0 / 1000.0) ** 2
                identity = _identity(slide_digest, tissue_class.name, polygon_l0)
                yield Feature(identity, region.label, tissue_class, area_mm2, polygon_l0)


def geojson_feature(feature: Feature) -> dict[str, Any]:
    """Return the feature as QuPath reads it: a locked annotation with class, color and area."""
    rings = [feature.geometry_l0.exterior, *feature.geometry_l0.interiors]
    return {
        "type": "Feature",
        "id": feature.id,
        "geometry": {"type": "Polygon", "coordinates": [shapely.get_coordinates(ring).tolist() for ring in rings]},
        "properties": {
            "objectType": "annotation",
            "isLocked": True,
            "classification": {"name": feature.tissue_class.name, "color": list(feature.tissue_class.color)},
            "measurements": {"Area mm^2": feature.area_mm2},
        },
    }


def geojson_text(features: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the text of a FeatureCollection in parts, one feature per line."""
    yield '{"type":"FeatureCollection","features":['
    for number, feature in enumerate(features):
        yield f"{',' if number else ''}\n{_dumps(feature)}"
    yield "\n]}\n"


def _on_grid(
    polygons_out: Sequence[shapely.Polygon], l0_per_out: float, size_l0: tuple[int, int]
) -> list[list[shapely.Polygon]]:
    """Return the valid polygons of each polygon, in level-0 pixels on the 0.01 px grid, in a fixed order."""

    def scale(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # The last column and row of the map may lie partly beyond the slide. Equal points stay equal, so neighbors do.
        return np.asarray(np.minimum(np.round(xy * l0_per_out, 2), size_l0))

    scaled = np.asarray(shapely.transform(np.array(polygons_out, dtype=object), scale), dtype=object)
    valid = shapely.is_valid(scaled) & ~shapely.is_empty(scaled)
    scaled[valid] = shapely.orient_polygons(shapely.remove_repeated_points(scaled[valid], 0.0), exterior_cw=False)
    return [[polygon] if ok else _repaired(polygon) for polygon, ok in zip(scaled, valid, strict=True)]


def _repaired(geometry: shapely.Geometry) -> list[shapely.Polygon]:
    # set_precision returns valid polygons on the grid only for valid input.
    on_grid = shapely.set_precision(shapely.make_valid(geometry, method="structure", keep_collapsed=False), GRID_L0)
    parts = shapely.get_parts(shapely.get_parts(on_grid))
    polygons = [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]
    # Without this, later operations would round again: the polygons would keep their own grid.
    free = [shapely.transform(shapely.set_precision(polygon, 0.0), lambda xy: np.round(xy, 2)) for polygon in polygons]
    free = [shapely.orient_polygons(shapely.normalize(polygon), exterior_cw=False) for polygon in free]
    return sorted((polygon for polygon in free if polygon.is_valid), key=lambda polygon: polygon.wkb)


def _identity(slide_digest: str, name: str, polygon_l0: shapely.Polygon) -> str:
    # The whole outline is the position, because corners or centers of two interlocking regions can coincide.
    outline = hashlib.sha256(shapely.to_wkb(shapely.normalize(polygon_l0), byte_order=1)).hexdigest()
    return str(uuid.uuid5(_NAMESPACE, json.dumps([slide_digest, name, outline])))


def _dumps(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _table(features: Sequence[Feature]) -> pa.Table:
    return pa.table(
        {
            "id": [feature.id for feature in features],
            "class": [feature.tissue_class.name for feature in features],
            "label": [feature.label for feature in features],
            "area_mm2": [feature.area_mm2 for feature in features],
            "geometry": [shapely.to_wkb(feature.geometry_l0, byte_order=1) for feature in features],
        },
        schema=_SCHEMA,
    )


def _check(classes: Sequence[TissueClass], l0_per_out: float, mpp_l0: float) -> None:
    for what, value in (("l0_per_out", l0_per_out), ("mpp_l0", mpp_l0)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} must be a positive number, not {value}")
    names = [one.name for one in classes]
    if len(set(names)) < len(names):
        raise ValueError(f"class names must be distinct, not {names}")
