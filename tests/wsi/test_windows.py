from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.windows import window_starts


@pytest.mark.parametrize(
    ("length", "side", "stride", "flush", "expected"),
    [
        (10, 4, 3, True, [0, 3, 6]),
        (11, 4, 3, True, [0, 3, 6, 7]),
        (11, 4, 3, False, [0, 3, 6, 9]),
        (4, 4, 3, True, [0]),
        (3, 4, 3, True, [0]),
        (3, 4, 3, False, [0]),
        (10, 2, 5, True, [0, 5, 8]),
    ],
)
def test_starts_of_known_lengths(length: int, side: int, stride: int, flush: bool, expected: list[int]) -> None:
    assert window_starts(length, side, stride, flush=flush) == expected


@given(st.integers(1, 900), st.integers(1, 90), st.floats(0, 1), st.booleans())
def test_windows_cover_every_pixel_and_none_starts_beyond(length: int, side: int, share: float, flush: bool) -> None:
    stride = max(1, round(side * share))
    starts = window_starts(length, side, stride, flush=flush)
    assert {pixel for start in starts for pixel in range(start, min(start + side, length))} == set(range(length))
    assert all(0 < following - start <= stride for start, following in pairwise(starts))
    assert all(0 <= start < length for start in starts)


@given(st.integers(1, 900), st.integers(1, 90), st.integers(1, 120))
def test_the_last_window_ends_with_the_length_or_keeps_the_stride(length: int, side: int, stride: int) -> None:
    flush, strided = window_starts(length, side, stride), window_starts(length, side, stride, flush=False)
    assert flush[-1] == max(0, length - side)
    assert strided == list(range(0, len(strided) * stride, stride))
    assert len(flush) == len(strided)
    assert flush[:-1] == strided[:-1]
