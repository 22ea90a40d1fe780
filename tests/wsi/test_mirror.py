from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi.box import Box
from wsi.mirror import mirror_outside, with_sources

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


@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 30))
def test_an_enlarged_box_has_every_pixel_that_is_mirrored(x: int, y: int, width: int, height: int, margin: int) -> None:
    image = Box(0, 0, 60, 40)
    around = Box(x - margin, y - margin, width + 2 * margin, height + 2 * margin)
    read = with_sources(around, image, 4)
    assert read.intersect(around) == around
    assert all(new == old or new % 4 == 0 for new, old in zip(read[:2], around[:2], strict=True))
    common = read.intersect(image)
    # What is mirrored twice needs more than the box has.
    if not (common.width and common.height) or max(around.right - 60, around.bottom - 40) > 40 or min(around[:2]) < 0:
        return
    whole_HWC = np.random.default_rng(7).integers(1, 256, (40, 60, 3), dtype=np.uint8)
    canvas_HWC = np.zeros((read.height, read.width, 3), np.uint8)
    canvas_HWC[common.slices(read)] = whole_HWC[common.slices(image)]
    mirror_outside(canvas_HWC, read, image)
    padded_HWC = np.pad(whole_HWC, [(100, 100), (100, 100), (0, 0)], mode="symmetric")
    rows, columns = around.slices(Box(-100, -100, 260, 240))
    np.testing.assert_array_equal(canvas_HWC[around.slices(read)], padded_HWC[rows, columns])
