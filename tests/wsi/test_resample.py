from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides import reduce, write_slide
from wsi.box import Box
from wsi.grid import Grid
from wsi.resample import area_mean, read_model_pixels, read_tiles
from wsi.slide import open_slide


def slow_area_mean(rgb_HWC: np.ndarray, factor: float, x: int, y: int) -> np.ndarray:
    """Return one target pixel as the sum over the covered area of every source pixel."""
    total, area = np.zeros(3), 0.0
    for row in range(rgb_HWC.shape[0]):
        for column in range(rgb_HWC.shape[1]):
            height = max(0.0, min((y + 1) * factor, row + 1) - max(y * factor, row))
            width = max(0.0, min((x + 1) * factor, column + 1) - max(x * factor, column))
            total += rgb_HWC[row, column] * height * width
            area += height * width
    return total / area


@settings(max_examples=30)
@given(st.floats(0.4, 4.5), st.integers(0, 2**32 - 1))
def test_area_mean_weights_pixels_by_their_covered_area(factor: float, seed: int) -> None:
    rgb_HWC = np.random.default_rng(seed).integers(0, 256, (14, 17, 3), dtype=np.uint8)
    width, height = int(17 / factor), int(14 / factor)
    result = area_mean(rgb_HWC, (0, 0), Box(0, 0, width, height), factor)
    assert result.shape == (height, width, 3)
    for x, y in ((0, 0), (width - 1, height - 1), (width // 2, height // 3)):
        assert np.abs(result[y, x] - slow_area_mean(rgb_HWC, factor, x, y)).max() <= 0.51


def plain_area_mean(rgb_HWC: np.ndarray, target: Box, factor: float) -> np.ndarray:
    """Average rows, then columns, with float32 weights from absolute positions, added in order."""

    def along_axis_0(values: np.ndarray, first: int, count: int) -> np.ndarray:
        means = np.zeros((count, *values.shape[1:]), np.float32)
        for i in range(count):
            start = (first + i) * factor
            for position in range(int(start), int(start) + math.ceil(factor) + 1):
                covered = max(0.0, min(start + factor, position + 1) - max(start, position))
                means[i] += values[min(position, len(values) - 1)] * np.float32(covered / factor)
        return means

    rows_HWC = along_axis_0(rgb_HWC.astype(np.float32), target.y, target.height)
    columns_WHC = along_axis_0(rows_HWC.swapaxes(0, 1), target.x, target.width)
    return np.floor(columns_WHC.swapaxes(0, 1) + np.float32(0.5)).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.6, 1.37, 2.064, 2.5, 3.7])
def test_fractional_means_have_the_same_bits_as_plain_sums(factor: float) -> None:
    rgb_HWC = np.random.default_rng(3).integers(0, 256, (150, 170, 3), dtype=np.uint8)
    target = Box(5, 3, int(170 / factor) - 6, int(150 / factor) - 4)
    np.testing.assert_array_equal(area_mean(rgb_HWC, (0, 0), target, factor), plain_area_mean(rgb_HWC, target, factor))


@pytest.mark.parametrize("factor", [2, 3, 4, 7, 16, 17])
def test_whole_means_are_rounded_half_up(factor: int) -> None:
    rgb_HWC = np.random.default_rng(4).integers(0, 256, (21 * factor, 19 * factor, 3), dtype=np.uint8)
    rgb_HWC[: 5 * factor] = 255
    np.testing.assert_array_equal(area_mean(rgb_HWC, (0, 0), Box(0, 0, 19, 21), float(factor)), reduce(rgb_HWC, factor))


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_every_sum_of_a_square_has_its_mean(factor: int) -> None:
    """Pillow computes these means. It does not round all sums half up for other factors."""
    square = factor**2
    sums = np.arange(255 * square + 1)
    # Of small numbers: 65,281 squares of 256 pixels take 3 s with eight bytes for each.
    more = np.arange(square, dtype=np.uint16) < (sums % square).astype(np.uint16)[:, None]
    squares = (sums // square).astype(np.uint8)[:, None] + more
    gray_HW = squares.reshape(-1, factor, factor).transpose(1, 0, 2).reshape(factor, -1)
    rgb_HWC = np.repeat(gray_HW[:, :, None], 3, axis=2)
    found_HWC = area_mean(rgb_HWC, (0, 0), Box(0, 0, len(sums), 1), float(factor))
    np.testing.assert_array_equal(found_HWC[0, :, 1], (sums + square // 2) // square)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 17.0, 1.37, 2.5, 0.6])
def test_a_pixel_does_not_depend_on_the_box_it_is_read_in(tmp_path: Path, factor: float) -> None:
    rgb_HWC = np.random.default_rng(1).integers(0, 256, (240, 250, 3), dtype=np.uint8)
    size_m = (int(200 / factor), int(180 / factor))
    grid = Grid(0, (7, 13), 1.0, factor, 1.0, size_m, 32, 4, 64)
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC)) as slide:
        whole = read_model_pixels(slide, grid, Box(0, 0, *size_m)).rgb_HWC
        part = Box(size_m[0] // 3, size_m[1] // 4, size_m[0] // 2, size_m[1] // 2)
        np.testing.assert_array_equal(
            read_model_pixels(slide, grid, part).rgb_HWC, whole[part.y : part.bottom, part.x : part.right]
        )


def test_tiles_read_together_equal_tiles_read_alone(tmp_path: Path) -> None:
    rgb_HWC = np.random.default_rng(2).integers(0, 256, (3000, 900, 3), dtype=np.uint8)
    grid = Grid(0, (0, 0), 1.0, 2.0, 1.0, (450, 1500), 64, 4, 64)
    tiles = [Box(0, 0, 64, 64), Box(48, 0, 64, 64), Box(384, 720, 64, 64), Box(0, 1440, 64, 64)]
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC)) as slide:
        together = read_tiles(slide, grid, tiles)
        for tile in tiles:
            np.testing.assert_array_equal(
                together.canvas_HWC[tile.slices(together.canvas_m)], read_model_pixels(slide, grid, tile).rgb_HWC
            )
        # The last tile reaches 4 rows beyond the slide.
        assert (together.canvas_HWC[tiles[-1].slices(together.canvas_m)][60:] == 255).all()
