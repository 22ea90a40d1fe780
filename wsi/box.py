"""An axis-aligned box of whole pixels."""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """An axis-aligned box of whole pixels in one frame. It is half-open: it contains x <= px < x + width."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """Return the first column right of the box."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """Return the first row below the box."""
        return self.y + self.height

    def intersect(self, other: Box) -> Box:
        """Return the common part of both boxes. Its width or height is 0 if they do not overlap."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        return Box(x, y, max(0, min(self.right, other.right) - x), max(0, min(self.bottom, other.bottom) - y))

    def slices(self, outer: Box) -> tuple[slice, slice]:
        """Return the rows and columns of this box in an array that covers `outer`. The box lies inside `outer`."""
        x, y = self.x - outer.x, self.y - outer.y
        return slice(y, y + self.height), slice(x, x + self.width)

    def reduce(self, factor: int) -> Box:
        """Return the box in pixels `factor` times as large. All four numbers are multiples of `factor`."""
        return Box(self.x // factor, self.y // factor, self.width // factor, self.height // factor)

    def shift(self, dx: int, dy: int) -> Box:
        """Return the box moved by (dx, dy)."""
        return Box(self.x + dx, self.y + dy, self.width, self.height)
