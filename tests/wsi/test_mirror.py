from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi.box import Box
from wsi.mirror import mirror_outside

SIDES = st.integers(1, 9)
CORNERS = st.integers(-12, 12)


@given(SIDES, SIDES, st.tuples(*[st.integers(0, 20)] * 4))
def test_beyond_its_edges_an_image_is_mirrored_as_often_as_needed(
    width: int, height: int, around: tuple[int, int, int, int]
) -> None:
    left, right, top, bottom = around
    image_HWC = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    canvas_HWC = np.full((top + height + bottom, left + width + right, 3), 255, np.uint8)
    canvas_HWC[top : top + height, left : left + width] = image_HWC
    canvas = Box(10 - left, 20 - top, left + width + right, top + height + bottom)
    mirror_outside(canvas_HWC, canvas, Box(10, 20, width, height))
    expected = np.pad(image_HWC, [(top, bottom), (left, right), (0, 0)], mode="symmetric")
    np.testing.assert_array_equal(canvas_HWC, expected)


@given(CORNERS, CORNERS, SIDES, SIDES)
def test_a_canvas_mirrors_only_what_it_has_of_the_image(x: int, y: int, width: int, height: int) -> None:
    before_HWC = np.random.default_rng(6).integers(0, 256, (height, width, 3), dtype=np.uint8)
    canvas, image = Box(x, y, width, height), Box(0, 0, 6, 5)
    after_HWC = before_HWC.copy()
    mirror_outside(after_HWC, canvas, image)
    common = canvas.intersect(image)
    if not (common.width and common.height):
        np.testing.assert_array_equal(after_HWC, before_HWC)
        return
    inside_HWC = before_HWC[common.slices(canvas)]
    np.testing.assert_array_equal(after_HWC[common.slices(canvas)], inside_HWC)
    assert {tuple(rgb) for rgb in after_HWC.reshape(-1, 3).tolist()} == {
        tuple(rgb) for rgb in inside_HWC.reshape(-1, 3).tolist()
    }
