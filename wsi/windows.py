"""Lay windows over a length: tiles, crops and views."""

from __future__ import annotations


def window_starts(length: int, side: int, stride: int, *, flush: bool = True) -> list[int]:
    """Return the starts of the windows of `side` pixels that together cover `length` pixels, in ascending order.

    The first window starts at 0 and the next ones every `stride` pixels. The last window ends with the length; if
    `flush` is False it keeps the stride and may reach beyond the length. A length of at most one `side` has one window.
    There are no gaps if `stride` is at most `side`.
    """
    last = max(0, length - side)
    return [*range(0, last, stride), last if flush else -(-last // stride) * stride]
