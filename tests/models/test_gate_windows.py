from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_windows import cut_windows, gated_mean, placed, window_axis

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


def test_axes_are_placed_on_a_device_as_they_are() -> None:
    axes = [window_axis(64, 64, 32, 64, 4), window_axis(0, 96, 32, 64, 2)]
    for before, after in zip(axes, placed(axes, torch.device("cpu")), strict=True):
        assert before.side == after.side
        for one, other in ((before.starts_R, after.starts_R), (before.upper_h, after.upper_h)):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype == torch.int32
        assert torch.equal(before.weight_h, after.weight_h)


def test_windows_are_cut_row_by_row_from_features_and_pixels() -> None:
    rows, columns = window_axis(64, 64, 32, 64, 4), window_axis(0, 96, 32, 64, 4)
    map_DHW = torch.arange(2 * 128 * 160.0).view(2, 128, 160)
    windows_MDhw = cut_windows(map_DHW, rows, columns)
    assert len(windows_MDhw) == len(rows.starts_R) * len(columns.starts_R)
    for index, window_Dhw in enumerate(windows_MDhw):
        y, x = rows.starts_R[index // len(columns.starts_R)], columns.starts_R[index % len(columns.starts_R)]
        assert torch.equal(window_Dhw, map_DHW[:, y : y + 64, x : x + 64])
    cells_MDhw = cut_windows(map_DHW[:, ::8, ::8], rows, columns, stride=8)
    assert torch.equal(cells_MDhw, windows_MDhw[:, :, ::8, ::8])


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1), st.sampled_from([2, 4]))
def test_the_gated_mean_is_that_of_four_windows_pixel_by_pixel(classes: int, seed: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = window_axis(32, 32, 32, 64, stride), window_axis(-64, 64, 32, 48, stride)
    size = len(rows.upper_h), len(columns.upper_h)
    logits_Khw = 3 * torch.randn(classes, *size, generator=generator)
    allowed_RCK = torch.rand(len(rows.starts_R), len(columns.starts_R), classes, generator=generator) < 0.6
    found_Khw = gated_mean(logits_Khw, allowed_RCK, rows, columns)
    exponents = logits_Khw.double().exp().numpy()
    (upper_h, weight_h), (upper_w, weight_w) = (
        (axis.upper_h.tolist(), axis.weight_h.tolist()) for axis in (rows, columns)
    )
    for y, x in np.ndindex(size):
        expected_K = np.zeros(classes)
        for row, of_row in ((upper_h[y], weight_h[y]), (upper_h[y] - 1, 1 - weight_h[y])):
            for column, of_column in ((upper_w[x], weight_w[x]), (upper_w[x] - 1, 1 - weight_w[x])):
                kept_K = exponents[:, y, x] * allowed_RCK[row, column].numpy()
                expected_K += of_row * of_column * kept_K / max(kept_K.sum(), 1e-300)
        np.testing.assert_allclose(found_Khw[:, y, x].numpy(), expected_K, atol=1e-5)


def test_windows_with_one_class_need_no_logits() -> None:
    rows, columns = window_axis(0, 64, 32, 64, 4), window_axis(0, 32, 32, 64, 4)
    allowed_RCK = torch.zeros(len(rows.starts_R), len(columns.starts_R), 3, dtype=torch.bool)
    allowed_RCK[:2, :, 0], allowed_RCK[2:, :, 2] = True, True
    arbitrary = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    with_logits, without = (
        gated_mean(logits, allowed_RCK, rows, columns) for logits in (arbitrary, torch.zeros(3, 1, 1))
    )
    assert torch.equal(with_logits, without)
    torch.testing.assert_close(without.sum(dim=0), torch.ones(16, 8))
    assert not without[1].any()
