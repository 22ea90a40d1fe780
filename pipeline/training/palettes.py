"""Colours for tissue classes that a data set gives none for."""

from __future__ import annotations

Colour = tuple[int, int, int]

CLASS_COLOURS: tuple[Colour, ...] = (
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
"""Found by a search (docs/decisions/0006-colors.md): every two differ for readers with any kind of colour blindness,
and each from glass, eosin, haematoxylin and the black that other viewers draw on. The first ones differ most.
"""


def class_colours(count: int) -> tuple[Colour, ...]:
    """The colours of that many classes. Raises ValueError where there are not as many."""
    if count > len(CLASS_COLOURS):
        raise ValueError(
            f"{count} classes, but only {len(CLASS_COLOURS)} colours can be told apart; give each class a color"
        )
    return CLASS_COLOURS[:count]
