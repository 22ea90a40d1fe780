from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_windows import cut_windows, gate_windows, gated_mean, placed, window_axis

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
    starts = found.starts_R.tolist()
    assert len(found.upper_h) == len(found.weight_h) == length // stride
    for pixel, (upper, weight) in enumerate(zip(found.upper_h.tolist(), found.weight_h.tolist(), strict=True)):
        center = core + stride * pixel + stride / 2
        later = math.floor(center / half) * half  # the last window of the slide that starts before the pixel
        assert 1 <= upper < len(starts)
        assert weight == pytest.approx(math.sin(math.pi * (center - later) / window) ** 2, abs=1e-6)
        # The earlier window has the rest, which is its own raised cosine.
        assert 1 - weight == pytest.approx(math.sin(math.pi * (center - later + half) / window) ** 2, abs=1e-6)
        for index, start in ((upper, later), (upper - 1, later - half)):
            inside = start - (core - margin)
            assert starts[index] == min(max(inside, 0), length + 2 * margin - found.side)


@given(axes)
def test_windows_lie_in_the_canvas_on_whole_cells_of_the_features(axis: tuple[int, int, int, int, int]) -> None:
    _, length, margin, window, _ = axis
    found = window_axis(*axis)
    assert found.side == min(window, length + 2 * margin)
    for start in found.starts_R.tolist():
        assert start % 8 == 0
        assert 0 <= start <= length + 2 * margin - found.side


def test_a_window_of_the_slide_has_the_same_weight_in_every_canvas() -> None:
    whole, left, right = (window_axis(start, length, 48, 96, 4) for start, length in ((0, 192), (0, 96), (96, 96)))
    assert torch.equal(whole.weight_h, torch.cat([left.weight_h, right.weight_h]))


def test_windows_are_placed_on_a_device_as_they_are() -> None:
    windows = [gate_windows([(0, 64), (96, 32)], (16, 24), 32, 64, 4), gate_windows([(-32, 0)], (8, 8), 48, 96, 2)]
    for before, after in zip(windows, placed(windows, torch.device("cpu")), strict=True):
        assert before[:2] == after[:2]
        for one, other in zip(before[2:], after[2:], strict=True):
            assert isinstance(one, torch.Tensor)
            assert isinstance(other, torch.Tensor)
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_windows_are_cut_canvas_by_canvas_and_row_by_row_from_features_and_pixels() -> None:
    corners = [(0, 64), (32, -96)]
    windows = gate_windows(corners, (16, 24), 32, 64, 4)
    axes = [(window_axis(y, 64, 32, 64, 4), window_axis(x, 96, 32, 64, 4)) for x, y in corners]
    places = [
        (n, y, x)
        for n, (rows, columns) in enumerate(axes)
        for y, x in product(rows.starts_R.tolist(), columns.starts_R.tolist())
    ]
    assert windows.counts == tuple((len(rows.starts_R), len(columns.starts_R)) for rows, columns in axes)
    map_NDHW = torch.arange(2 * 2 * 128 * 160.0).view(2, 2, 128, 160)
    windows_MDhw = cut_windows(map_NDHW, windows, slice(None))
    assert len(windows_MDhw) == len(places)
    for (n, y, x), window_Dhw in zip(places, windows_MDhw, strict=True):
        assert torch.equal(window_Dhw, map_NDHW[n, :, y : y + 64, x : x + 64])
    cells_MDhw = cut_windows(map_NDHW[:, :, ::8, ::8], windows, slice(3, 9), stride=8)
    assert torch.equal(cells_MDhw, windows_MDhw[3:9, :, ::8, ::8])


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1), st.sampled_from([2, 4]))
def test_the_gated_mean_is_that_of_four_windows_pixel_by_pixel(classes: int, seed: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners, size = [(-64, 32), (96, 0)], (32 // stride, 64 // stride)
    windows = gate_windows(corners, size, 32, 64, stride)
    logits_NKhw = 3 * torch.randn(2, classes, *size, generator=generator)
    allowed_MK = torch.rand(len(windows.canvas_M), classes, generator=generator) < 0.6
    found_NKhw = gated_mean(logits_NKhw, allowed_MK, windows)
    exponents = logits_NKhw.double().exp().numpy()
    of_canvas = allowed_MK.split([rows * columns for rows, columns in windows.counts])
    for n, (corner_x, corner_y) in enumerate(corners):
        allowed_RCK = of_canvas[n].numpy().reshape(*windows.counts[n], classes)
        rows, columns = window_axis(corner_y, 32, 32, 64, stride), window_axis(corner_x, 64, 32, 64, stride)
        (upper_h, weight_h), (upper_w, weight_w) = (
            (axis.upper_h.tolist(), axis.weight_h.tolist()) for axis in (rows, columns)
        )
        for y, x in np.ndindex(size):
            expected_K = np.zeros(classes)
            for row, of_row in ((upper_h[y], weight_h[y]), (upper_h[y] - 1, 1 - weight_h[y])):
                for column, of_column in ((upper_w[x], weight_w[x]), (upper_w[x] - 1, 1 - weight_w[x])):
                    kept_K = exponents[n, :, y, x] * allowed_RCK[row, column]
                    expected_K += of_row * of_column * kept_K / max(kept_K.sum(), 1e-300)
            np.testing.assert_allclose(found_NKhw[n, :, y, x].numpy(), expected_K, atol=1e-5)


def test_windows_with_one_class_need_no_logits() -> None:
    windows = gate_windows([(0, 0)], (16, 8), 32, 64, 4)
    allowed_RCK = torch.zeros(*windows.counts[0], 3, dtype=torch.bool)
    allowed_RCK[:2, :, 0], allowed_RCK[2:, :, 2] = True, True
    arbitrary = torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    with_logits, without = (
        gated_mean(logits, allowed_RCK.flatten(0, 1), windows) for logits in (arbitrary, torch.zeros(1, 3, 1, 1))
    )
    assert torch.equal(with_logits, without)
    torch.testing.assert_close(without.sum(dim=1), torch.ones(1, 16, 8))
    assert not without[:, 1].any()
