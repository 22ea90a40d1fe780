"""Areas of classes and their shares of everything that is classified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from models.tissue_class import Color, TissueClass

UNKNOWN: Color = (150, 150, 150)
"""Color of a class whose record is lost: only its name and area are known."""


MISSING = "–"
"""Stands for an unknown number in pages."""


@dataclass(frozen=True)
class ClassArea:
    """The area of one class on one slide or on several."""

    name: str
    color: Color
    area_mm2: float
    share: float | None
    """Share of the classified area, from 0 to 1; None if nothing is classified."""


def class_areas(areas_mm2: Mapping[str, float], classes: Iterable[TissueClass]) -> list[ClassArea]:
    """Return the areas in their order, with shares and with the colors of `classes`."""
    colors = {one.name: one.color for one in classes}
    total = sum(areas_mm2.values())
    return [
        ClassArea(name, colors.get(name, UNKNOWN), area, area / total if total else None)
        for name, area in areas_mm2.items()
    ]


def share_text(share: float | None) -> str:
    """Return a share of 1 as a percentage: "73.8 %", or "–" if there is nothing to share."""
    if share is None:
        return MISSING
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.{1 if share else 0}f} %"
