from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import hed2rgb, rgb2hed

from pipeline.training.augment import EOSIN, replace_eosin
from pipeline.training.changes import CHANGES, SIMILAR


def stained(height: int = 60, width: int = 90) -> NDArray[np.uint8]:
    """Return an image with stripes of hematoxylin on a gradient of eosin."""
    hed_HWC = np.zeros((height, width, 3))
    hed_HWC[..., 0] = np.where(np.arange(width) // 6 % 2, 0.12, 0.01)
    hed_HWC[..., 1] = np.linspace(0.01, 0.15, height)[:, None]
    rgb_HWC: NDArray[np.uint8] = np.rint(255 * hed2rgb(hed_HWC)).astype(np.uint8)
    return rgb_HWC


def changed(name: str, seed: int = 0, rgb_HWC: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    return CHANGES[name](stained() if rgb_HWC is None else rgb_HWC, np.random.default_rng(seed))


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_depends_on_its_generator_alone_and_leaves_its_input(name: str) -> None:
    rgb_HWC = stained()
    first, again = changed(name, 3, rgb_HWC), changed(name, 3, rgb_HWC)
    assert np.array_equal(first, again)
    assert np.array_equal(rgb_HWC, stained())
    assert first.dtype == np.uint8
    assert first.shape == rgb_HWC.shape
    assert np.abs(first.astype(int) - rgb_HWC).mean() > 1


def test_gray_and_negative() -> None:
    gray_HWC = changed("gray")
    assert (gray_HWC == gray_HWC[..., :1]).all()
    assert np.array_equal(255 - changed("inverted"), stained())


def test_every_other_order_of_the_colors_is_drawn_and_never_the_usual_one() -> None:
    orders = {changed("reordered", seed).tobytes() for seed in range(60)}
    expected = {np.ascontiguousarray(stained()[..., order]).tobytes() for order in ORDERS}
    assert orders == expected


ORDERS = ([0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])


def test_the_hue_turns_by_at_least_an_eighth_of_the_circle() -> None:
    pink_HWC = np.full((4, 4, 3), (220, 60, 140), dtype=np.uint8)
    turned = {tuple(changed("turned_hue", seed, pink_HWC)[0, 0].tolist()) for seed in range(40)}
    assert len(turned) > 20
    # The hue of (220, 60, 140) is 330°.
    for red, green, blue in turned:
        hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
        assert abs((hue - 330 + 180) % 360 - 180) > 40


def test_the_other_stain_replaces_eosin_only() -> None:
    dab_3 = np.array([0.27, 0.57, 0.78]) / np.linalg.norm([0.27, 0.57, 0.78])
    brown_HWC = replace_eosin(stained(), dab_3.astype(np.float32))
    # By scikit-image's unmixing, what was eosin is DAB now, and hematoxylin has stayed.
    before_HWC, after_HWC = rgb2hed(stained()), rgb2hed(brown_HWC)
    assert after_HWC[..., 0] == pytest.approx(before_HWC[..., 0], abs=0.01)
    assert after_HWC[..., 1] == pytest.approx(0, abs=0.01)
    assert after_HWC[..., 2] == pytest.approx(before_HWC[..., 1] + before_HWC[..., 2], abs=0.01)
    assert np.abs(replace_eosin(stained(), EOSIN).astype(int) - stained()).max() <= 1


def test_another_stain_is_never_like_eosin() -> None:
    eosin_HWC = np.rint(256 * np.exp(-0.8 * EOSIN) - 1).astype(np.uint8)[None, None]
    for seed in range(30):
        density_3 = -np.log((changed("restained", seed, eosin_HWC)[0, 0] + 1.0) / 256)
        assert density_3 @ EOSIN / np.linalg.norm(density_3) < SIMILAR + 0.02


def test_the_strengths_of_blur_and_size_are_within_their_ranges() -> None:
    edge_HWC = np.zeros((64, 64, 3), dtype=np.uint8)
    edge_HWC[:, 32:] = 255
    for seed in range(10):
        # The slope of a blurred edge is that of a Gaussian with this deviation.
        profile_W = changed("blurred", seed, edge_HWC)[32, :, 0].astype(float)
        deviation = 255 / (np.diff(profile_W).max() * np.sqrt(2 * np.pi))
        assert 1.3 <= deviation <= 5.5
        # The edge comes back at the mirror line: its place tells the factor.
        dark_W = changed("shrunk", seed, edge_HWC)[0, :, 0] < 128
        assert 0.4 * 32 - 1 <= dark_W.argmin() <= 0.65 * 32 + 1
    assert changed("shrunk", 0, np.zeros((1, 1, 3), dtype=np.uint8)).shape == (1, 1, 3)


def test_an_enlarged_image_is_a_part_of_the_image() -> None:
    # Red grows by 4 per row and green by 2 per column.
    rows, columns = np.mgrid[:60, :90]
    ramp_HWC = np.stack([4 * rows, 2 * columns, 0 * rows], axis=2).astype(np.uint8)
    corners = set()
    for seed in range(10):
        large_HWC = changed("enlarged", seed, ramp_HWC).astype(float)
        factors = (
            4 * 40 / (large_HWC[50, 45, 0] - large_HWC[10, 45, 0]),
            2 * 60 / (large_HWC[30, 75, 1] - large_HWC[30, 15, 1]),
        )
        assert min(factors) >= 1.5
        assert max(factors) <= 2.7
        assert factors[0] == pytest.approx(factors[1], rel=0.1)
        corners.add(tuple(large_HWC[0, 0]))
    assert len(corners) > 5
