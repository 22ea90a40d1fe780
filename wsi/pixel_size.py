"""How large a slide's pixels are, and the slide with them.

Every function names the slide's file in its errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from wsi.box import Box
from wsi.errors import ResolutionError

MppSource = Literal["argument", "slide", "tiff resolution", "objective power"]

MPP_RANGE = (0.01, 100.0)
"""Micrometres per pixel that a slide can have: finer than light resolves, up to coarser than any model takes."""

LONGEST_MM, LARGEST_MM2 = 400.0, 30_000.0
"""Side and area of the largest slide: more than those of the largest glasses there are.
A file that claims more has damaged sizes, or its pixel size is wrong; its thumbnail alone would take gigabytes."""

# Above this a TIFF resolution is a printer's 72 to 300 dpi, not a microscope's.
_COARSEST_TIFF_MPP = 40.0


def find_mpp(
    path: Path, properties: Mapping[str, str], given: float | None
) -> tuple[float, MppSource, tuple[str, ...]]:
    """Micrometres per level-0 pixel, where they come from, and warnings: what is given, then what the file says itself,
    then its TIFF resolution, then a guess from the objective power.

    Raises ResolutionError where there is none of them, or pixels are not square.
    """
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise ResolutionError(
                f"{path.name}: --mpp is {given}; it must be a positive number of micrometres per pixel"
            )
        return given, "argument", ()
    pair = _positive(properties, "openslide.mpp-x"), _positive(properties, "openslide.mpp-y")
    source: MppSource = "slide"
    if None in pair or _is_tiff_resolution(properties, pair):
        pair = _tiff_mpp(properties)
        source = "tiff resolution"
    mpp_x, mpp_y = pair
    if mpp_x is not None and mpp_y is not None:
        if abs(mpp_x / mpp_y - 1) > 0.02:
            raise ResolutionError(
                f"{path.name}: pixels are not square ({mpp_x:g}×{mpp_y:g} µm); pass --mpp to state one size for both"
            )
        return math.sqrt(mpp_x * mpp_y), source, ()
    power = _positive(properties, "openslide.objective-power")
    if power is not None:
        mpp = 10 / power
        warning = f"no micrometres per pixel in the file; {mpp:g} was guessed from the objective power {power:g}"
        return mpp, "objective power", (warning,)
    raise ResolutionError(f"{path.name}: no micrometres per pixel in the file; pass --mpp")


def _positive(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _is_tiff_resolution(properties: Mapping[str, str], pair: tuple[float | None, float | None]) -> bool:
    # Both libraries pass a plain TIFF's resolution tags on as the slide's own mpp.
    tags = _tiff_mpp(properties, coarsest=math.inf)
    return all(own and tag and math.isclose(own, tag, rel_tol=1e-6) for own, tag in zip(pair, tags, strict=True))


def _tiff_mpp(properties: Mapping[str, str], coarsest: float = _COARSEST_TIFF_MPP) -> tuple[float | None, float | None]:
    unit_um = {"inch": 25400.0, "centimeter": 10000.0}.get(properties.get("tiff.ResolutionUnit", "").lower())
    x, y = _positive(properties, "tiff.XResolution"), _positive(properties, "tiff.YResolution")
    if unit_um is None or x is None or y is None or max(unit_um / x, unit_um / y) > coarsest:
        return None, None
    return unit_um / x, unit_um / y


def check_extent(path: Path, bounds_l0: Box, mpp: float) -> None:
    """Raise ResolutionError where no slide can have such pixels, or be as large as they make it."""
    least, most = MPP_RANGE
    if not least <= mpp <= most:
        raise ResolutionError(
            f"{path.name}: {mpp:g} µm per pixel is no slide's ({least:g} to {most:g} are); pass the right one as --mpp"
        )
    width_mm, height_mm = bounds_l0.width * mpp / 1000, bounds_l0.height * mpp / 1000
    if width_mm * height_mm > LARGEST_MM2 or max(width_mm, height_mm) > LONGEST_MM:
        raise ResolutionError(
            f"{path.name}: {bounds_l0.width}×{bounds_l0.height} px at {mpp:g} µm are {width_mm:,.0f}×{height_mm:,.0f} "
            f"mm, larger than any slide (at most {LONGEST_MM:g} mm a side and {LARGEST_MM2:,.0f} mm²); pass the right "
            f"--mpp, or copy or scan it again"
        )
