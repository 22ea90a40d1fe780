"""Pixel masks of patches whose classes were outlined completely, for `wsi-evaluate`. Networks are not trained on them.

Shape suffixes: H and W are the patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from shapely.geometry.base import BaseGeometry

from pipeline.files import replacing

UNKNOWN = 255
"""Value of a pixel whose class nobody outlined, or that lies in the outlines of several classes."""

GRID_PX = 0.001
"""Corners of areas lie on this grid, which makes their text short and keeps them valid."""

Areas = tuple[str, ...]
"""Area of each class in a patch as WKT, in the patch's pixels; "" for a class without one."""


class Outlined(NamedTuple):
    """A patch, what was outlined in it, and the side of its mask in pixels."""

    name: str
    areas: Areas
    side: int


class Cutter:
    """Cuts one large area into patches. A tree finds the parts that a patch touches."""

    def __init__(self, area: BaseGeometry) -> None:
        self._tree = shapely.STRtree(shapely.get_parts(area))

    def cut(self, x_l0: float, y_l0: float, side_l0: float, side: int) -> str:
        """Return the part of the area (in level-0 pixels) that lies in a patch, as WKT in the patch's pixels."""
        box = shapely.box(x_l0, y_l0, x_l0 + side_l0, y_l0 + side_l0)
        parts = self._tree.geometries[self._tree.query(box, predicate="intersects")]
        inside = shapely.intersection(shapely.union_all(parts), box)
        moved = shapely.transform(inside, lambda points: (points - (x_l0, y_l0)) * (side / side_l0))
        return _text(shapely.set_precision(moved, GRID_PX))


def joined(texts: Sequence[str]) -> str:
    """Return the union of areas; "" for none."""
    if len(texts) < 2:
        return "".join(texts)
    return _text(shapely.union_all([shapely.from_wkt(text) for text in texts], grid_size=GRID_PX))


def _text(area: BaseGeometry) -> str:
    # Lines and points, in which areas touch a border, are left out.
    polygons = [part for part in shapely.get_parts(area).tolist() if isinstance(part, shapely.Polygon)]
    if not polygons:  # slivers that collapse on the grid
        return "MULTIPOLYGON EMPTY"
    return str(shapely.to_wkt(shapely.multipolygons(polygons), rounding_precision=3))


def checked_area(text: str) -> str:
    """Return the WKT of an area. Raises ValueError if it is not an area."""
    try:
        area = shapely.from_wkt(text)
    except shapely.errors.ShapelyError as error:
        raise ValueError(f"is not WKT: {error}") from error
    if not isinstance(area, (shapely.Polygon, shapely.MultiPolygon)):
        raise ValueError(f"is a {area.geom_type}, which has no area")
    if not area.is_valid:
        raise ValueError(f"is not a valid area: {shapely.is_valid_reason(area)}")
    return text


def mask_HW(areas: Areas, side: int) -> NDArray[np.uint8]:
    """Return the mask of a patch: the index of the class in whose area the center of a pixel lies, else `UNKNOWN`."""
    y_N, x_N = (axis.ravel() + 0.5 for axis in np.mgrid[:side, :side])
    classes_N = np.full(side * side, UNKNOWN, np.uint8)
    count_N = np.zeros(side * side, np.uint8)
    for k, text in enumerate(areas):
        if text:
            inside_N = shapely.contains_xy(shapely.from_wkt(text), x_N, y_N)
            classes_N[inside_N] = k
            count_N += inside_N
    classes_N[count_N != 1] = UNKNOWN
    return classes_N.reshape(side, side)


# The sets are small, and each label that is saved asks for all of them again.
@lru_cache(maxsize=100_000)
def classes_in(areas: Areas, side: int) -> frozenset[int]:
    """Return the class indices in the mask of a patch."""
    return frozenset(int(value) for value in np.unique(mask_HW(areas, side))) - {UNKNOWN}


def write_masks(folder: Path, patches: Iterable[Outlined]) -> None:
    """Write the masks of patches as gray PNG files, leave the files that are up to date, and remove all others."""
    folder.mkdir(exist_ok=True)
    left = {file.name for file in folder.glob("*.png")}
    for patch in patches:
        file = folder / f"{patch.name}.png"
        digest = hashlib.sha256(repr(patch[1:]).encode()).hexdigest()
        if file.name not in left or _digest_of(file) != digest:
            note = PngImagePlugin.PngInfo()
            note.add_text("areas", digest)
            with replacing(file) as partial:
                Image.fromarray(mask_HW(patch.areas, patch.side)).save(partial, "PNG", pnginfo=note)
        left.discard(file.name)
    for name in left:
        (folder / name).unlink()


def _digest_of(file: Path) -> str | None:
    """Return the digest of the areas that a mask was made from, or None if the file does not state it."""
    try:
        with Image.open(file) as image:
            found: str | None = image.info.get("areas")
            return found
    except OSError:
        return None
