from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.slides import GLASS, PINK
from wsi import masks, stain
from wsi.stain import DEFAULT_GLASS, Look, densities, glass_color, looks


def speckled(shape: tuple[int, int], noise: int, seed: int) -> NDArray[np.uint8]:
    """Return glass with noise, specks of all colors and a pink box."""
    rng = np.random.default_rng(seed)
    rgb_HWC: NDArray[np.uint8] = np.empty((*shape, 3), np.uint8)
    rgb_HWC[:] = GLASS
    rgb_HWC[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] // 2] = PINK
    rgb_HWC = np.clip(rgb_HWC + rng.integers(-noise, noise + 1, rgb_HWC.shape), 0, 255).astype(np.uint8)
    specks_HW = rng.random(shape) < 0.002
    rgb_HWC[specks_HW] = rng.integers(0, 256, (int(specks_HW.sum()), 3))
    return rgb_HWC


def slow_glass_color(rgb_HWC: NDArray[np.uint8]) -> tuple[float, ...]:
    """Return the mean of the glass-like pixels in the most frequent 3×3×3 bins of four values, from all pixels."""
    values_HWC = rgb_HWC.astype(int)
    green_HW = values_HWC[..., 1]
    range_HW = ndimage.maximum_filter(green_HW, 3) - ndimage.minimum_filter(green_HW, 3)
    pink_HW = np.minimum(values_HWC[..., 0], values_HWC[..., 2]) - green_HW
    glass_HW = (range_HW <= 8) & (values_HWC.max(axis=2) >= 170) & (np.ptp(values_HWC, axis=2) <= 40) & (pink_HW <= 12)
    bins_NC = values_HWC[glass_HW] // 4
    counts = np.zeros((64, 64, 64))
    np.add.at(counts, tuple(bins_NC.T), 1)
    around = ndimage.correlate(counts, np.ones((3, 3, 3)), mode="constant")
    if around.max() < max(1, 0.005 * glass_HW.size):
        return DEFAULT_GLASS
    best_C = np.array(np.unravel_index(around.argmax(), around.shape))
    here_N = (np.abs(bins_NC - best_C) <= 1).all(axis=1)
    return tuple((values_HWC[glass_HW][here_N].sum(axis=0) / here_N.sum()).tolist())


@pytest.mark.parametrize("noise", [0, 2, 5, 120])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (90, 130)])
def test_the_color_of_the_glass_is_that_of_its_slow_definition(shape: tuple[int, int], noise: int) -> None:
    for seed in range(5):
        rgb_HWC = speckled(shape, noise, seed)
        assert glass_color(rgb_HWC) == slow_glass_color(rgb_HWC)


@pytest.mark.parametrize(("box", "glass"), [((234, 218, 228), GLASS), ((234, 231, 222), (234, 231, 222))])
def test_a_color_that_is_pink_relative_to_another_is_not_that_of_the_glass(
    box: tuple[int, int, int], glass: tuple[int, int, int]
) -> None:
    rgb_HWC = np.full((100, 100, 3), GLASS, np.uint8)
    rgb_HWC[:, 5:] = box
    assert glass_color(rgb_HWC) == glass


def test_white_beside_pink_glass_is_padding() -> None:
    rgb_HWC = np.full((100, 100, 3), 255, np.uint8)
    rgb_HWC[:, 40:] = (232, 222, 230)
    assert glass_color(rgb_HWC) == (232, 222, 230)


def test_densities_of_a_part_equal_those_of_the_whole_image() -> None:
    rgb_HWC = speckled((60, 80), 20, 3)
    whole = densities(rgb_HWC, slice(0, 60), slice(0, 80), GLASS)
    for rows, columns, reach in ((slice(10, 20), slice(30, 33), 0), (slice(0, 5), slice(70, 80), 5)):
        part = densities(rgb_HWC, rows, columns, GLASS, reach)
        wide = (
            slice(max(0, rows.start - reach), rows.stop + reach),
            slice(columns.start - reach, columns.stop + reach),
        )
        np.testing.assert_array_equal(part.od_CHW, whole.od_CHW[:, *wide])
        np.testing.assert_array_equal(part.light_HW, whole.light_HW[wide])


@pytest.mark.parametrize("noise", [0, 1, 2, 4, 8, 20])
def test_plain_glass_that_is_not_processed_has_no_look(monkeypatch: pytest.MonkeyPatch, noise: int) -> None:
    rgb_HWC = speckled((150, 300), noise, noise)
    found_HW = looks(rgb_HWC, GLASS)
    monkeypatch.setattr(stain, "_PLAIN_MOST", -1.0)
    monkeypatch.setattr(masks, "PATCH_ROWS", 1000)
    np.testing.assert_array_equal(found_HW, looks(rgb_HWC, GLASS))


def test_nearly_bare_glass_has_no_look_and_textured_glass_has() -> None:
    rgb_HWC = speckled((64, 64), 0, 0)
    rgb_HWC[:] = GLASS
    rgb_HWC[::2] -= 4  # density 0.016
    assert not looks(rgb_HWC, GLASS).any()
    rgb_HWC[32:] = GLASS
    rgb_HWC[32::8] -= 24
    assert (looks(rgb_HWC, GLASS)[48:] & Look.TEXTURED).any()
