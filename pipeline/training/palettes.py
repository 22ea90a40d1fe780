"""Default colors of tissue classes, for data sets that do not define colors."""

from __future__ import annotations

from models.tissue_class import Color

CLASS_COLORS: tuple[Color, ...] = (
    (17, 34, 102),
    (255, 238, 0),
    (204, 17, 0),
    (34, 119, 255),
    (102, 255, 204),
    (102, 0, 0),
    (0, 34, 238),
    (85, 187, 119),
    (153, 51, 85),
    (255, 102, 34),
)
"""Found by a search (docs/decisions/0006-colors.md). Any two colors differ for readers with any color blindness.
Each differs from glass, eosin, hematoxylin and the black background of other viewers. The first colors differ most.
"""


def class_colors(count: int) -> tuple[Color, ...]:
    """Return the colors of `count` classes. Raises ValueError if there are not enough colors."""
    if count > len(CLASS_COLORS):
        raise ValueError(
            f"{count} classes, but the palette has only {len(CLASS_COLORS)} distinct colors; set a color for each class"
        )
    return CLASS_COLORS[:count]
