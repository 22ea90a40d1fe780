"""A result's polygons for drawing: several levels of detail, as plain arrays that a browser reads without parsing.

Bytes of a response, little endian: uint32 polygons N, rings R, points P and a 0; float64 area_mm2[N]; uint32 label[N];
uint32 first_ring[N + 1]; uint32 first_point[R + 1]; float32 xy[P][2] in level-0 pixels of the result's frame. A
polygon's first ring is its outline, the others are holes; rings are closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pipeline.formats.left_out import CLASSES

TOLERANCES_L0 = (0.0, 4.0, 16.0, 64.0, 256.0)
"""Largest distance of the lines of each level of detail from the stored lines, in level-0 pixels."""

BATCH = 1 << 15
"""Polygons in memory as objects at a time: they take several times the bytes of a response."""

_LABELS = {one.name: label for label, one in enumerate(CLASSES, start=1)}

_Arrays = tuple[NDArray[Any], ...]
"""The areas, labels, rings of each polygon, points of each ring, and the points."""


def outline_bytes(path: Path, detail: int) -> bytes | None:
    """Return the polygons of a GeoParquet file at a level of detail, 0 being the full detail; None for any other level.

    Small polygons lose corners, but every polygon is included. Raises OSError if the file cannot be read.
    """
    if not 0 <= detail < len(TOLERANCES_L0):
        return None
    try:
        # Arrow does not open names that are not UTF-8.
        with path.open("rb") as binary, pq.ParquetFile(binary) as file:
            batches = file.iter_batches(BATCH, columns=["label", "area_mm2", "geometry"])
            parts = [_batch_arrays(batch, TOLERANCES_L0[detail]) for batch in batches]
    except (pa.ArrowException, shapely.errors.ShapelyError, LookupError, TypeError, ValueError) as error:
        raise OSError(f"{path.name}: cannot be read: {error}") from error
    return _encoded(parts)


def left_out_bytes(path: Path, detail: int) -> bytes | None:
    """Return the left-out areas of a GeoJSON file as `outline_bytes` does; label k is the kind k of `LeftOut`."""
    if not 0 <= detail < len(TOLERANCES_L0):
        return None
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        label = [_LABELS[feature["properties"]["classification"]["name"]] for feature in features]
        area_mm2 = [float(feature["properties"]["measurements"]["Area mm^2"]) for feature in features]
        polygons = shapely.from_geojson([json.dumps(feature["geometry"]) for feature in features])
        arrays = _arrays(polygons, np.array(area_mm2), np.array(label), TOLERANCES_L0[detail])
    except (shapely.errors.ShapelyError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise OSError(f"{path.name}: cannot be read: {error}") from error
    return _encoded([arrays] if features else [])


def _encoded(parts: Sequence[_Arrays]) -> bytes:
    """Return the bytes of a response."""
    if not parts:
        return np.zeros(6, "<u4").tobytes()
    area_mm2, label, ring_counts, point_counts, xy_l0 = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    counts = np.array([len(area_mm2), len(point_counts), len(xy_l0), 0])
    fields = (
        (counts, "<u4"),
        (area_mm2, "<f8"),
        (label, "<u4"),
        (np.cumsum([0, *ring_counts]), "<u4"),
        (np.cumsum([0, *point_counts]), "<u4"),
        (xy_l0, "<f4"),
    )
    return b"".join(np.ascontiguousarray(values, dtype).tobytes() for values, dtype in fields)


def _batch_arrays(batch: pa.RecordBatch, tolerance_l0: float) -> _Arrays:
    polygons = shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
    area_mm2, label = (batch[name].to_numpy(zero_copy_only=False) for name in ("area_mm2", "label"))
    return _arrays(polygons, area_mm2, label, tolerance_l0)


def _arrays(polygons: NDArray[Any], area_mm2: NDArray[Any], label: NDArray[Any], tolerance_l0: float) -> _Arrays:
    if tolerance_l0:
        polygons = _simplified(polygons, tolerance_l0)
    _, xy_l0, (first_point, first_ring) = shapely.to_ragged_array(polygons)
    return area_mm2, label, np.diff(first_ring), np.diff(first_point), xy_l0.astype(np.float32)


def _simplified(polygons: NDArray[Any], tolerance_l0: float) -> NDArray[Any]:
    left, top, right, bottom = shapely.bounds(polygons).T
    # At the zooms of this detail a small polygon is drawn as its box. Simplifying it would take most of the time.
    small = np.maximum(right - left, bottom - top) <= 2 * tolerance_l0
    simple = np.empty_like(polygons)
    simple[small] = shapely.envelope(polygons[small])
    simple[~small] = shapely.simplify(polygons[~small], tolerance_l0, preserve_topology=True)
    return simple
