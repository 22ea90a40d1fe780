"""Find the size of a slide's pixels, and check that the slide has a plausible size.

Every error names the slide's file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from wsi.box import Box
from wsi.errors import ResolutionError

MppSource = Literal["argument", "slide", "tiff resolution", "objective power"]

FAR_SHARE = 0.1
"""A given pixel size that differs by more than this share from the file's own adds a warning to the result."""

MPP_RANGE = (0.01, 100.0)
"""Plausible micrometers per pixel: from finer than light resolves to coarser than any model accepts."""

LONGEST_MM, LARGEST_MM2 = 400.0, 30_000.0
"""Side and area of the largest plausible slide, larger than any glass slide. A file that claims more has damaged sizes
or a wrong pixel size. Its thumbnail alone would take gigabytes."""

# Coarser TIFF resolutions are those of printers, 72 to 300 dpi.
_COARSEST_TIFF_MPP = 40.0

_STATED_BY: dict[MppSource, str] = {
    "slide": "the file states",
    "tiff resolution": "its TIFF resolution gives",
    "objective power": "its objective power suggests",
}

_UM_PER_UNIT = {"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0}
"""Units that OME-XML may state, except those without a length ("pixel") and those that no microscope writes."""


def find_mpp(
    path: Path, properties: Mapping[str, str], size_l0: tuple[int, int], given: float | None
) -> tuple[float, MppSource, tuple[str, ...]]:
    """Return the micrometers per level-0 pixel, their source, and warnings.

    The first of these counts: the given value, the file's own value (of its maker, or of its OME-XML for an image of
    `size_l0`), its TIFF resolution, a guess from the objective power. A given value that is far from the file's own
    adds a warning, and so does every given value for pixels that are not square. Raises ResolutionError if there is
    none of them, or if pixels are not square and no value is given.
    """
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise ResolutionError(
                f"{path.name}: --mpp is {given}; it must be a positive number of micrometers per pixel"
            )
        return given, "argument", _contradiction(path, properties, size_l0, given)
    return _own_mpp(path, properties, size_l0)


def _contradiction(
    path: Path, properties: Mapping[str, str], size_l0: tuple[int, int], given: float
) -> tuple[str, ...]:
    """Return a warning if the given value is far from the file's own, or if no value fits both sides of its pixels."""
    used = f"the given pixel size {given:g} µm/px is used, but"
    stated = _stated_sides(properties, size_l0)
    if stated is not None and not _is_square(mpp_x := stated[0], mpp_y := stated[1]):
        return (
            f"{used} {_STATED_BY[stated[2]]} {mpp_x:g}×{mpp_y:g} µm/px, and one size cannot fit pixels that are not "
            f"square: lengths are off by {given / mpp_x - 1:+.0%} along x and {given / mpp_y - 1:+.0%} along y, areas "
            f"by {given**2 / (mpp_x * mpp_y) - 1:+.0%}",
        )
    try:
        own, source, _ = _own_mpp(path, properties, size_l0)
    except ResolutionError:
        return ()  # the value was given because the file has none
    if 1 / (1 + FAR_SHARE) <= given / own <= 1 + FAR_SHARE:
        return ()
    return (f"{used} {_STATED_BY[source]} {own:g} µm/px",)


def _own_mpp(
    path: Path, properties: Mapping[str, str], size_l0: tuple[int, int]
) -> tuple[float, MppSource, tuple[str, ...]]:
    stated = _stated_sides(properties, size_l0)
    if stated is not None:
        mpp_x, mpp_y, source = stated
        if not _is_square(mpp_x, mpp_y):
            raise ResolutionError(
                f"{path.name}: pixels are not square ({mpp_x:g}×{mpp_y:g} µm); pass --mpp to set one size for both axes"
            )
        return math.sqrt(mpp_x * mpp_y), source, ()
    power = _positive(properties, "openslide.objective-power")
    if power is not None:
        mpp = 10 / power
        warning = (
            f"the file does not contain micrometers per pixel; {mpp:g} was guessed from the objective power {power:g}"
        )
        return mpp, "objective power", (warning,)
    raise ResolutionError(f"{path.name}: does not contain micrometers per pixel; pass --mpp")


def _stated_sides(
    properties: Mapping[str, str], size_l0: tuple[int, int]
) -> tuple[float, float, Literal["slide", "tiff resolution"]] | None:
    """Return the width and height of a pixel that the file states, and which part of the file states them."""
    pair = _positive(properties, "openslide.mpp-x"), _positive(properties, "openslide.mpp-y")
    source: Literal["slide", "tiff resolution"] = "slide"
    if None in pair or _is_tiff_resolution(properties, pair):
        pair = _ome_mpp(properties, size_l0)
    if None in pair:
        pair = _tiff_mpp(properties)
        source = "tiff resolution"
    mpp_x, mpp_y = pair
    return None if mpp_x is None or mpp_y is None else (mpp_x, mpp_y, source)


def _is_square(mpp_x: float, mpp_y: float) -> bool:
    return abs(mpp_x / mpp_y - 1) <= 0.02


def _positive(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _is_tiff_resolution(properties: Mapping[str, str], pair: tuple[float | None, float | None]) -> bool:
    # Both libraries report the resolution tags of a plain TIFF as the slide's own mpp.
    tags = _tiff_mpp(properties, coarsest=math.inf)
    return all(own and tag and math.isclose(own, tag, rel_tol=1e-6) for own, tag in zip(pair, tags, strict=True))


def _tiff_mpp(properties: Mapping[str, str], coarsest: float = _COARSEST_TIFF_MPP) -> tuple[float | None, float | None]:
    unit_um = {"inch": 25400.0, "centimeter": 10000.0}.get(properties.get("tiff.ResolutionUnit", "").lower())
    x, y = _positive(properties, "tiff.XResolution"), _positive(properties, "tiff.YResolution")
    if unit_um is None or x is None or y is None or max(unit_um / x, unit_um / y) > coarsest:
        return None, None
    return unit_um / x, unit_um / y


def _ome_mpp(properties: Mapping[str, str], size_l0: tuple[int, int]) -> tuple[float | None, float | None]:
    """Return the pixel size that OME-XML states for the first image of this size. Neither library reads OME-XML."""
    try:
        root = ET.fromstring(properties.get("tiff.ImageDescription", ""))  # noqa: S314 - tifffile parses it too
    except (ET.ParseError, ValueError):
        return None, None
    # The namespace of the elements contains the version of the schema.
    for pixels in root.iterfind("{*}Image/{*}Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == tuple(map(str, size_l0)):
            return _physical_size(pixels, "X"), _physical_size(pixels, "Y")
    return None, None


def _physical_size(pixels: ET.Element, axis: str) -> float | None:
    size = _positive(pixels.attrib, f"PhysicalSize{axis}")
    # Both the micro sign and the Greek letter are in use.
    unit_um = _UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ"))
    return None if size is None or unit_um is None else size * unit_um


def check_extent(path: Path, bounds_l0: Box, mpp: float) -> None:
    """Raise ResolutionError if the pixel size, or the slide's size that follows from it, is not plausible."""
    least, most = MPP_RANGE
    if not least <= mpp <= most:
        raise ResolutionError(
            f"{path.name}: {mpp:g} µm/px is not a plausible pixel size; expected {least:g}–{most:g} µm/px; pass the "
            f"right one as --mpp"
        )
    width_mm, height_mm = bounds_l0.width * mpp / 1000, bounds_l0.height * mpp / 1000
    if width_mm * height_mm > LARGEST_MM2 or max(width_mm, height_mm) > LONGEST_MM:
        raise ResolutionError(
            f"{path.name}: {bounds_l0.width}×{bounds_l0.height} px at {mpp:g} µm/px are "
            f"{width_mm:,.0f}×{height_mm:,.0f} mm, larger than any slide (at most {LONGEST_MM:g} mm a side and "
            f"{LARGEST_MM2:,.0f} mm²); pass the right --mpp, or copy or scan the slide again"
        )
