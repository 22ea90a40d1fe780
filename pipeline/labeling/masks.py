"""Pixel masks of patches whose classes were outlined completely, for `wsi-evaluate`. Networks are not trained on them.

Shape suffixes: H and W are the patch.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry.base import BaseGeometry

from pipeline.files import replacing

UNKNOWN = 255
"""Value of a pixel whose class nobody outlined, or that lies in the outlines of several classes."""

Areas = tuple[str, ...]
"""Area of each class in a patch as WKT, in the patch's pixels; "" for a class without one."""


def cut_to_patch(area: BaseGeometry, x_l0: float, y_l0: float, side_l0: float, side: int) -> str:
    """Return the part of an area (in level-0 pixels) that lies in a patch, as WKT in the patch's pixels."""
    inside = shapely.intersection(area, shapely.box(x_l0, y_l0, x_l0 + side_l0, y_l0 + side_l0))
    moved = shapely.transform(inside, lambda points: (points - (x_l0, y_l0)) * (side / side_l0))
    return str(shapely.to_wkt(moved, rounding_precision=3))


def checked_area(text: str) -> str:
    """Return the WKT of an area. Raises ValueError if the text is not WKT or has no area."""
    try:
        kind = shapely.from_wkt(text).geom_type
    except shapely.errors.ShapelyError as error:
        raise ValueError(f"is not WKT: {error}") from error
    if kind not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        raise ValueError(f"is a {kind}, which has no area")
    return text


@lru_cache(maxsize=4096)
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
    mask = classes_N.reshape(side, side)
    mask.flags.writeable = False  # shared by all callers
    return mask


def classes_in(masks: Iterable[NDArray[np.uint8]]) -> set[int]:
    """Return the class indices that masks contain."""
    return {int(value) for mask in masks for value in np.unique(mask)} - {UNKNOWN}


def write_masks(folder: Path, masks: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
    """Write (name, mask) pairs as gray PNG files, leave the files that are equal, and remove all others."""
    folder.mkdir(exist_ok=True)
    names = {f"{name}.png" for name, _ in masks}
    for file in folder.glob("*.png"):
        if file.name not in names:
            file.unlink()
    for name, mask in masks:
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        file = folder / f"{name}.png"
        if not file.exists() or file.read_bytes() != buffer.getvalue():
            with replacing(file) as partial:
                partial.write_bytes(buffer.getvalue())
