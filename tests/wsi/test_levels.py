from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.levels import MPP_TOLERANCE, levels_of_one_shape, pick_level

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


@given(
    st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)),
    st.lists(st.tuples(st.sampled_from([2, 3, 4]), st.sampled_from([math.floor, math.ceil, round])), max_size=9),
)
def test_levels_rounded_up_or_down_in_several_steps_are_the_same_image(
    size_l0: tuple[int, int], steps: list[tuple[int, Callable[[float], int]]]
) -> None:
    sizes = [size_l0]
    for factor, rounded in steps:
        width, height = (max(1, rounded(side / factor)) for side in sizes[-1])
        sizes.append((width, height))
    assert levels_of_one_shape(sizes) == len(sizes)


@pytest.mark.parametrize(
    ("size", "same"),
    [
        ((1024, 512), True),
        ((1024, 522), True),  # 2 %
        ((1024, 523), False),
        ((100, 54), True),  # 4 px
        ((100, 55), False),
        ((512, 1024), False),
        ((256, 256), False),
        ((1024, 256), False),
    ],
)
def test_levels_end_before_one_with_another_shape(size: tuple[int, int], same: bool) -> None:
    assert levels_of_one_shape([(4096, 2048), (2048, 1024), size, (32, 16)]) == (4 if same else 2)
    turned = [(height, width) for width, height in [(4096, 2048), (2048, 1024), size, (32, 16)]]
    assert levels_of_one_shape(turned) == (4 if same else 2)
