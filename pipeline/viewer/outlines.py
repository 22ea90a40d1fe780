"""A result's polygons for drawing: at several degrees of detail, as plain arrays that a browser reads without parsing.

Bytes of an answer, little endian: uint32 polygons N, rings R, points P and a 0; float64 area_mm2[N]; uint32 label[N];
uint32 first_ring[N + 1]; uint32 first_point[R + 1]; float32 xy[P][2] in level-0 pixels of the result's frame. A
polygon's first ring is its outline, the others are holes; rings are closed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import shapely

TOLERANCES_L0 = (0.0, 4.0, 16.0, 64.0, 256.0)
"""How far, in level-0 pixels, the lines of each degree of detail may lie from the stored ones."""


def outline_bytes(path: Path, detail: int) -> bytes | None:
    """The polygons of a GeoParquet at a degree of detail, 0 being all of it; None where there is no such degree.

    Small polygons lose corners but none is left out. Raises OSError where the file cannot be read.
    """
    if not 0 <= detail < len(TOLERANCES_L0):
        return None
    table = pq.read_table(path, columns=["label", "area_mm2", "geometry"])
    polygons = shapely.from_wkb(table["geometry"].to_numpy())
    if tolerance := TOLERANCES_L0[detail]:
        polygons = shapely.simplify(polygons, tolerance, preserve_topology=True)
    if len(polygons):
        _, xy_l0, (first_point, first_ring) = shapely.to_ragged_array(polygons)
    else:
        xy_l0, first_point, first_ring = np.empty((0, 2)), np.zeros(1), np.zeros(1)
    parts = (
        (np.array([len(polygons), len(first_point) - 1, len(xy_l0), 0]), "<u4"),
        (table["area_mm2"].to_numpy(), "<f8"),
        (table["label"].to_numpy(), "<u4"),
        (first_ring, "<u4"),
        (first_point, "<u4"),
        (xy_l0, "<f4"),
    )
    return b"".join(np.ascontiguousarray(values, dtype).tobytes() for values, dtype in parts)
