from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_windows import cut_windows, gated_mean, window_axis

axes = st.tuples(
    st.integers(-20, 40).map(lambda n: 32 * n),  # start of the core
    st.integers(1, 8).map(lambda n: 32 * n),  # its length
    st.sampled_from([16, 32, 48, 64]),  # margin
    st.sampled_from([16, 48, 64, 96, 224]),  # window
    st.sampled_from([1, 2, 4]),  # stride
)


@given(axes)
def test_two_windows_cover_each_pixel_with_weights_that_sum_to_one(axis: tuple[int, int, int, int, int]) -> None:
    core, length, margin, window, stride = axis
    found = window_axis(*axis)
    half = window // 2
    assert len(found.upper) == len(found.weight) == length // stride
    for pixel, (upper, weight) in enumerate(zip(found.upper, found.weight, strict=True)):
        center = core + stride * pixel + stride / 2
        later = math.floor(center / half) * half  # the last window of the slide that starts before the pixel
        assert 1 <= upper < len(found.starts)
        assert weight == pytest.approx(math.sin(math.pi * (center - later) / window) ** 2, abs=1e-6)
        # The earlier window has the rest, which is its own raised cosine.
        assert 1 - weight == pytest.approx(math.sin(math.pi * (center - later + half) / window) ** 2, abs=1e-6)
        for index, start in ((upper, later), (upper - 1, later - half)):
            inside = start - (core - margin)
            assert found.starts[index] == min(max(inside, 0), length + 2 * margin - found.side)


@given(axes)
def test_windows_lie_in_the_canvas_on_whole_cells_of_the_features(axis: tuple[int, int, int, int, int]) -> None:
    _, length, margin, window, _ = axis
    found = window_axis(*axis)
    assert found.side == min(window, length + 2 * margin)
    for start in found.starts:
        assert start % 8 == 0
        assert 0 <= start <= length + 2 * margin - found.side


def test_a_window_of_the_slide_has_the_same_weight_in_every_canvas() -> None:
    whole, left, right = (window_axis(start, length, 48, 96, 4) for start, length in ((0, 192), (0, 96), (96, 96)))
    assert whole.weight == pytest.approx(left.weight + right.weight)
    places = [96 * 0 - 48 + 48 * (index - 1) for index in range(len(whole.starts))]
    assert places[0] < 0 < places[-1]


def test_windows_are_cut_row_by_row_from_features_and_pixels() -> None:
    rows, columns = window_axis(64, 64, 32, 64, 4), window_axis(0, 96, 32, 64, 4)
    map_DHW = torch.arange(2 * 128 * 160.0).view(2, 128, 160)
    windows_MDhw = cut_windows(map_DHW, rows, columns)
    assert len(windows_MDhw) == len(rows.starts) * len(columns.starts)
    for index, window_Dhw in enumerate(windows_MDhw):
        y, x = rows.starts[index // len(columns.starts)], columns.starts[index % len(columns.starts)]
        assert torch.equal(window_Dhw, map_DHW[:, y : y + 64, x : x + 64])
    cells_MDhw = cut_windows(map_DHW[:, ::8, ::8], rows, columns, stride=8)
    assert torch.equal(cells_MDhw, windows_MDhw[:, :, ::8, ::8])


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1), st.sampled_from([2, 4]))
def test_the_gated_mean_is_that_of_four_windows_pixel_by_pixel(classes: int, seed: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = window_axis(32, 32, 32, 64, stride), window_axis(-64, 64, 32, 48, stride)
    size = len(rows.upper), len(columns.upper)
    logits_Khw = 3 * torch.randn(classes, *size, generator=generator)
    allowed_RCK = torch.rand(len(rows.starts), len(columns.starts), classes, generator=generator) < 0.6
    found_Khw = gated_mean(logits_Khw, allowed_RCK, rows, columns)
    exponents = logits_Khw.double().exp().numpy()
    for y, x in np.ndindex(size):
        expected_K = np.zeros(classes)
        for row, of_row in ((rows.upper[y], rows.weight[y]), (rows.upper[y] - 1, 1 - rows.weight[y])):
            for column, of_column in (
                (columns.upper[x], columns.weight[x]),
                (columns.upper[x] - 1, 1 - columns.weight[x]),
            ):
                kept_K = exponents[:, y, x] * allowed_RCK[row, column].numpy()
                expected_K += of_row * of_column * kept_K / max(kept_K.sum(), 1e-300)
        np.testing.assert_allclose(found_Khw[:, y, x].numpy(), expected_K, atol=1e-5)


def test_windows_with_one_class_need_no_logits() -> None:
    rows, columns = window_axis(0, 64, 32, 64, 4), window_axis(0, 32, 32, 64, 4)
    allowed_RCK = torch.zeros(len(rows.starts), len(columns.starts), 3, dtype=torch.bool)
    allowed_RCK[:2, :, 0], allowed_RCK[2:, :, 2] = True, True
    arbitrary = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    with_logits, without = (
        gated_mean(logits, allowed_RCK, rows, columns) for logits in (arbitrary, torch.zeros(3, 1, 1))
    )
    assert torch.equal(with_logits, without)
    torch.testing.assert_close(without.sum(dim=0), torch.ones(16, 8))
    assert not without[1].any()
