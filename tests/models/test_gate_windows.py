from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.decoder_parts import parts_of
from models.gate_windows import (
    WHOLE,
    GateWindows,
    PixelGates,
    cut_windows,
    gate_windows,
    pixel_gates,
    placed,
    window_axis,
)

axes = st.tuples(
    st.integers(-20, 40).map(lambda n: 32 * n),  # start of the core
    st.integers(1, 8).map(lambda n: 32 * n),  # its length
    st.sampled_from([16, 32, 48, 64]),  # margin
    st.sampled_from([16, 48, 64, 96, 224]),  # window
    st.sampled_from([1, 2, 4]),  # stride
)


@given(axes)
def test_the_weights_of_the_windows_over_a_pixel_are_raised_cosines_that_sum_to_a_whole(
    axis: tuple[int, int, int, int, int],
) -> None:
    core, length, margin, window, stride = axis
    found = window_axis(*axis)
    step = {16: 16, 48: 16, 64: 16, 96: 16, 224: 48}[window]
    assert found.weight_hR.shape == (length // stride, len(found.starts_R))
    for pixel, weight_R in enumerate(found.weight_hR.tolist()):
        center = core + stride * pixel + stride / 2
        last = math.floor(center / step) * step
        over = [start for start in range(last - 240, last + step, step) if start < center < start + window]
        cosines = [math.sin(math.pi * (center - start) / window) ** 2 for start in over]
        weights = [(place, weight) for place, weight in enumerate(weight_R) if weight]
        # A weight below half a part is 0. The largest weight takes what rounding leaves.
        expected = [WHOLE * cosine / sum(cosines) for cosine in cosines]
        kept = [k for k, weight in enumerate(expected) if weight > 0.5]
        assert len(kept) == len(weights)
        assert sum(weight for _, weight in weights) == WHOLE
        for k, (place, weight) in zip(kept, weights, strict=True):
            assert weight == int(weight)
            assert abs(weight - expected[k]) <= (len(over) if expected[k] > max(expected) - 1 else 0.5 + 1e-9)
            inside = over[k] - (core - margin)
            assert found.starts_R[place] == min(max(inside, 0), length + 2 * margin - found.side)


@given(axes, st.integers(-3, 3))
def test_the_number_of_windows_does_not_depend_on_the_place(axis: tuple[int, int, int, int, int], cells: int) -> None:
    core, *rest = axis
    assert window_axis(*axis).weight_hR.shape == window_axis(core + 16 * cells, *rest).weight_hR.shape


@given(axes)
def test_windows_lie_in_the_canvas_on_whole_cells_of_the_features(axis: tuple[int, int, int, int, int]) -> None:
    _, length, margin, window, _ = axis
    found = window_axis(*axis)
    assert found.side == min(window, length + 2 * margin)
    for start in found.starts_R.tolist():
        assert start % 16 == 0
        assert 0 <= start <= length + 2 * margin - found.side


def test_a_window_of_the_slide_has_the_same_weight_in_every_canvas() -> None:
    def by_place(core: int, length: int) -> list[dict[int, float]]:
        found = window_axis(core, length, 96, 96, 4)
        places = [core - 96 + start for start in found.starts_R.tolist()]
        rows = [zip(places, weight_R, strict=True) for weight_R in found.weight_hR.tolist()]
        return [{place: weight for place, weight in row if weight} for row in rows]

    assert by_place(0, 192) == by_place(0, 64) + by_place(64, 128)
    assert by_place(16, 96) == by_place(0, 192)[4:28]


def test_windows_are_placed_on_a_device_as_they_are() -> None:
    windows = [gate_windows([(0, 64), (96, 32)], (16, 24), 32, 64, 4), gate_windows([(-32, 0)], (8, 8), 48, 96, 2)]
    others = [torch.tensor([[3, 4, 5]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)]
    there, others_there = placed(windows, others, torch.device("cpu"))
    assert [one.tolist() for one in others_there] == [[[3, 4, 5]], [7]]
    for before, after in zip(windows, there, strict=True):
        assert before.sides == after.sides
        for one, other in zip(before[1:], after[1:], strict=True):
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
    assert windows.shape == (2, len(axes[0][0].starts_R), len(axes[0][1].starts_R))
    map_NDHW = torch.arange(2 * 2 * 128 * 160.0).view(2, 2, 128, 160)
    windows_MDhw = cut_windows(map_NDHW, windows, range(len(places)))
    assert len(windows_MDhw) == len(places)
    for (n, y, x), window_Dhw in zip(places, windows_MDhw, strict=True):
        assert torch.equal(window_Dhw, map_NDHW[n, :, y : y + 64, x : x + 64])
    cells_MDhw = cut_windows(map_NDHW[:, :, ::8, ::8], windows, range(3, 9), stride=8)
    assert torch.equal(cells_MDhw, windows_MDhw[3:9, :, ::8, ::8])


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.sampled_from([16, 64, 224]))
def test_the_gate_is_the_exact_share_of_the_windows_that_allow_a_class(
    classes: int, seed: int, stride: int, window: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners, size = [(-64, 32), (96, 0)], (32 // stride, 64 // stride)
    windows = gate_windows(corners, size, 32, window, stride)
    allowed_NRCK = torch.rand(*windows.shape, classes, generator=generator) < 0.4
    found = pixel_gates(allowed_NRCK.flatten(0, 2), windows)
    for n, (corner_x, corner_y) in enumerate(corners):
        weight_hR = window_axis(corner_y, 32, 32, window, stride).weight_hR.numpy().astype(int)
        weight_wC = window_axis(corner_x, 64, 32, window, stride).weight_hR.numpy().astype(int)
        allowed_RCK = allowed_NRCK[n].numpy()
        for y, x in np.ndindex(size):
            weight_RC = weight_hR[y][:, None] * weight_wC[x][None]
            # Integers below 2^24 and their share of 2^20 have no rounding, so this is equality of bits.
            expected_K = (weight_RC[:, :, None] * allowed_RCK).sum(axis=(0, 1)) / WHOLE**2
            assert found.gate_NKhw[n, :, y, x].tolist() == expected_K.tolist()
            assert found.covered_N1hw[n, 0, y, x] == (weight_RC * allowed_RCK.any(axis=2)).sum() / WHOLE**2


def rows_of_classes(*classes: int | None) -> tuple[Tensor, GateWindows]:
    """Return what each window allows, (M, 3), and the windows: each row of windows allows its class, or none."""
    windows = gate_windows([(0, 0)], (16, 8), 32, 64, 4)
    allowed_RCK = torch.zeros(*windows.shape[1:], 3, dtype=torch.bool)
    for row in range(len(allowed_RCK)):
        k = classes[min(row, len(classes) - 1)]
        if k is not None:
            allowed_RCK[row, :, k] = True
    return allowed_RCK.flatten(0, 1), windows


def contested(gates: PixelGates, height: int, width: int) -> list[bool]:
    """Return in which canvases the whole core depends on logits."""
    found: list[bool] = gates.contested([(slice(0, height), slice(0, width))])[0].tolist()
    return found


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8, 16]))
def test_only_contested_parts_depend_on_logits(seed: int, side: int) -> None:
    windows = gate_windows([(0, 0), (48, 32)], (16, 16), 32, 64, 4)
    rng = torch.Generator().manual_seed(seed)
    # One class for most windows, a second one for some, and none for others.
    allowed_NRCK = torch.zeros(*windows.shape, 3, dtype=torch.bool)
    allowed_NRCK[..., 1] = torch.rand(windows.shape, generator=rng) < 0.9
    allowed_NRCK[..., 0] = torch.rand(windows.shape, generator=rng) < 0.02
    gates = pixel_gates(allowed_NRCK.flatten(0, 2), windows)
    parts = parts_of((16, 16), side)
    probs_NKhw = gates.probabilities(torch.randn(2, 3, 16, 16, generator=rng))
    for part, contested_N in zip(parts, gates.contested(parts), strict=True):
        without_NKhw = gates.inside(part).probabilities(torch.zeros(1, 3, 1, 1))
        several_Nhw = (gates.gate_NKhw[..., *part] > 0).sum(dim=1) > 1
        assert contested_N.tolist() == several_Nhw.flatten(1).any(dim=1).tolist()
        for n in range(2):
            if not contested_N[n]:
                assert torch.equal(without_NKhw[n], probs_NKhw[n][:, *part])


def test_windows_with_the_same_single_class_need_no_logits() -> None:
    gates = pixel_gates(*rows_of_classes(None, None, 1))
    assert contested(gates, 16, 8) == [False]
    logits_1Khw = torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    probs_1Khw = gates.probabilities(logits_1Khw)
    assert torch.equal(probs_1Khw, gates.probabilities(torch.zeros(1, 3, 1, 1)))
    assert torch.equal(probs_1Khw[:, 1], gates.covered_N1hw[:, 0])
    assert probs_1Khw[0, 1, 0, 0] < 0.75
    assert (probs_1Khw[0, 1, 8:] == 1).all()


def test_neighboring_windows_with_different_single_classes_are_contested() -> None:
    gates = pixel_gates(*rows_of_classes(0, 0, 0, 2))
    assert contested(gates, 16, 8) == [True]
    logits_1Khw = torch.tensor([5.0, 9.0, 0.0]).view(1, 3, 1, 1)
    probs_1Khw = gates.probabilities(logits_1Khw)
    torch.testing.assert_close(probs_1Khw.sum(dim=1), torch.ones(1, 16, 8))
    assert (probs_1Khw[:, 1] == 0).all()
    # The segmenter decides between both: class 0 has the larger logit, so class 2 has less than its windows' share.
    share_h = gates.gate_NKhw[0, 2, :, 0]
    between_h = (share_h > 0) & (share_h < 1)
    assert between_h.sum() > 4
    assert (probs_1Khw[0, 2, between_h, 0] < share_h[between_h]).all()
