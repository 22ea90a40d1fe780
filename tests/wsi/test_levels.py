from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.levels import MPP_TOLERANCE, pick_level

downsamples_of_pyramids = st.lists(st.floats(1.0, 256.0), min_size=1, max_size=9, unique=True)


@pytest.mark.parametrize(
    ("wanted", "level"),
    [(0.5, 0), (1.0, 0), (3.9, 0), (3.95, 1), (4.0, 1), (15.0, 1), (16.0, 2), (1000.0, 2)],
)
def test_the_coarsest_level_that_is_fine_enough_is_picked(wanted: float, level: int) -> None:
    assert pick_level((1.0, 4.0, 16.0), wanted) == level


def test_a_level_within_the_tolerance_is_fine_enough() -> None:
    assert pick_level((1.0, 16.0 * (1 + 0.99 * MPP_TOLERANCE)), 16.0) == 1
    assert pick_level((1.0, 16.0 * (1 + 1.01 * MPP_TOLERANCE)), 16.0) == 0


@given(downsamples_of_pyramids, st.floats(0.1, 512.0))
def test_no_level_between_the_picked_one_and_the_wanted_size_is_missed(downsamples: list[float], wanted: float) -> None:
    picked = downsamples[pick_level(downsamples, wanted)]
    limit = wanted * (1 + MPP_TOLERANCE)
    if picked > limit:
        assert picked == min(downsamples)
    else:
        assert not [downsample for downsample in downsamples if picked < downsample <= limit]


@given(downsamples_of_pyramids, st.floats(0.1, 512.0))
def test_the_order_of_the_levels_does_not_matter(downsamples: list[float], wanted: float) -> None:
    reordered = sorted(downsamples)
    assert downsamples[pick_level(downsamples, wanted)] == reordered[pick_level(reordered, wanted)]
