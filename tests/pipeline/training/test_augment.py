from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import hed2rgb, rgb2hed

from pipeline.training.augment import Augmentation, Move, blurred, rescanned, restain


@given(st.integers(0, 3), st.booleans(), st.integers(0, 9), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6))
def test_boxes_move_with_their_pixels(turns: int, flip: bool, x: int, y: int, w: int, h: int) -> None:
    size = 16
    x, y = min(x, size - w), min(y, size - h)
    mask_HW = np.zeros((size, size), np.uint8)
    mask_HW[y : y + h, x : x + w] = 1
    move = Move(turns, flip)
    x1, y1, w1, h1 = move.boxes(np.array([[x, y, w, h]]), size, size)[0]
    expected_HW = np.zeros_like(mask_HW)
    expected_HW[y1 : y1 + h1, x1 : x1 + w1] = 1
    np.testing.assert_array_equal(move.image(mask_HW), expected_HW)


def test_the_eight_moves_are_the_eight_symmetries_of_a_square() -> None:
    corner_HW = np.arange(9, dtype=np.uint8).reshape(3, 3)
    seen = {Move(turns, flip).image(corner_HW).tobytes() for turns in range(4) for flip in (False, True)}
    assert len(seen) == 8


def test_moves_are_drawn_from_the_chosen_set() -> None:
    corner_HW = np.arange(9, dtype=np.uint8).reshape(3, 3)
    rng = np.random.default_rng(0)

    def drawn(moves: str) -> set[bytes]:
        return {Move.draw(rng, moves).image(corner_HW).tobytes() for _ in range(200)}

    mirror = {corner_HW.tobytes(), corner_HW[:, ::-1].tobytes()}
    assert drawn("mirror") == mirror
    assert drawn("flips") == mirror | {corner_HW[::-1].tobytes(), corner_HW[::-1, ::-1].tobytes()}
    assert len(drawn("symmetries")) == 8


def test_the_share_of_blurred_images_is_the_setting_and_zero_draws_nothing() -> None:
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    rng = np.random.default_rng(1)
    assert blurred(rgb_HWC, 0.0, rng) is rgb_HWC
    assert rng.integers(1000) == np.random.default_rng(1).integers(1000)
    results = [blurred(rgb_HWC, 0.3, rng) for _ in range(300)]
    changed = [result for result in results if result is not rgb_HWC]
    assert 60 < len(changed) < 120
    assert len({result.tobytes() for result in changed}) > 50
    assert all(result.std() <= rgb_HWC.std() for result in changed)


def test_the_default_augmentation_changes_no_color() -> None:
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    assert Augmentation().colors(rgb_HWC, np.random.default_rng(1)) is rgb_HWC


def test_restaining_of_strength_zero_changes_nothing() -> None:
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    assert restain(rgb_HWC, 0.0, np.random.default_rng(1)) is rgb_HWC


def test_restaining_scales_the_stains_that_scikit_image_unmixes() -> None:
    rgb_HWC = np.array([[[180, 90, 150], [120, 60, 140], [200, 130, 170]]], np.uint8)
    strength = 0.2
    draws = np.random.default_rng(3)
    scale_3, shift_3 = 1 + draws.uniform(-strength, strength, 3), draws.uniform(-strength, strength, 3) / 5
    # scikit-image uses the same vectors, but divides by log(1e-6), works on rgb / 255 and clips at white.
    hed_HWC = rgb2hed(rgb_HWC)
    unit = np.linalg.norm([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], axis=1)
    changed_HWC = hed_HWC * scale_3 + shift_3 / unit / -np.log(1e-6)
    expected_HWC = hed2rgb(changed_HWC) * 255
    restained_HWC = restain(rgb_HWC, strength, np.random.default_rng(3)).astype(float)
    assert np.abs(restained_HWC - expected_HWC).max() < 2.5
    assert np.abs(restained_HWC - rgb_HWC).max() > 5


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_restained_images_differ_with_the_seed_and_repeat_with_it(strength: float) -> None:
    rgb_HWC = np.full((2, 2, 3), (190, 110, 160), np.uint8)
    first, again, other = (restain(rgb_HWC, strength, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_rescanning_changes_the_image_within_its_strength_and_not_at_strength_0() -> None:
    rgb_HWC = np.random.default_rng(0).integers(40, 200, (32, 32, 3)).astype(np.uint8)
    assert rescanned(rgb_HWC, 0.0, np.random.default_rng(1)) is rgb_HWC
    changed = [rescanned(rgb_HWC, 0.3, np.random.default_rng(seed)) for seed in range(30)]
    assert all(image.shape == rgb_HWC.shape and image.dtype == np.uint8 for image in changed)
    means = [float(image.mean()) / float(rgb_HWC.mean()) for image in changed]
    assert min(means) > 0.9
    assert max(means) < 1.1
    assert len({image.tobytes() for image in changed}) == 30
    np.testing.assert_array_equal(changed[0], rescanned(rgb_HWC, 0.3, np.random.default_rng(0)))
