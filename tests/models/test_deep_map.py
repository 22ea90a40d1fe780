"""The joined deep features of canvases: which ones each canvas reads, and that borders between canvases do not show."""

from __future__ import annotations

from itertools import chain, pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from models.backbone_windows import ALONE, OVERLAP, RING, Place, window_places
from models.bundle import load_bundle, load_networks
from models.card import NO_DIGEST, ModelCard
from models.deep_map import (
    DeepWindows,
    features_at,
    joined_windows,
    lone_windows,
    rows_of,
)
from models.predictor import Predictor
from tests.models.networks import sharing_networks

MARGIN = 64


def place(top: int, left: int, height: int, width: int, margin: int = MARGIN) -> Place:
    """Return the canvas of a core."""
    return slice(top - margin, top + height + margin), slice(left - margin, left + width + margin)


SQUARE = [place(y, x, 96, 64) for y in (0, 96) for x in (0, 64)]


def test_a_window_has_all_that_the_segmenter_reads_only_at_the_edges_of_the_block() -> None:
    most = MARGIN + RING
    assert window_places(SQUARE, MARGIN, None) == [
        (slice(-most, 96 + OVERLAP), slice(-most, 64 + OVERLAP)),
        (slice(-most, 96 + OVERLAP), slice(64 - OVERLAP, 128 + most)),
        (slice(96 - OVERLAP, 192 + most), slice(-most, 64 + OVERLAP)),
        (slice(96 - OVERLAP, 192 + most), slice(64 - OVERLAP, 128 + most)),
    ]
    assert window_places(SQUARE[:1], MARGIN, None) == [(slice(-most, 96 + most), slice(-most, 64 + most))]
    # The cores begin at the left edge of the block and end at its bottom edge.
    assert window_places(SQUARE, MARGIN, (slice(-64, 192), slice(0, 512))) == [
        (slice(-ALONE, 96 + OVERLAP), slice(-most, 64 + OVERLAP)),
        (slice(-ALONE, 96 + OVERLAP), slice(64 - OVERLAP, 128 + ALONE)),
        (slice(96 - OVERLAP, 192 + most), slice(-most, 64 + OVERLAP)),
        (slice(96 - OVERLAP, 192 + most), slice(64 - OVERLAP, 128 + ALONE)),
    ]
    # A small margin bounds what a window needs.
    assert window_places([place(0, 0, 32, 32, 16)], 16, (slice(-64, 512), slice(-64, 512))) == [
        (slice(-16 - RING, 48 + RING), slice(-16 - RING, 48 + RING))
    ]
    # Cores that meet only at a corner do not touch.
    corners = [place(0, 0, 32, 32), place(32, 32, 32, 32)]
    assert window_places(corners, MARGIN, (slice(-64, 512), slice(-64, 512))) == [
        (slice(-ALONE, 32 + ALONE), slice(-ALONE, 32 + ALONE)),
        (slice(32 - ALONE, 64 + ALONE), slice(32 - ALONE, 64 + ALONE)),
    ]


def test_windows_end_at_the_edges_of_the_image() -> None:
    places = [place(64, 64, 32, 32), place(64, 96, 32, 64)]
    found = joined_windows(places, (160, 224), MARGIN, 16, 1)
    assert found.places == [(slice(0, 160), slice(0, 96 + OVERLAP)), (slice(0, 160), slice(96 - OVERLAP, 224))]
    # The decoder reads 16 px around a core.
    assert found.cores == [(slice(48, 112), slice(48, 112)), (slice(48, 112), slice(OVERLAP - 16, OVERLAP + 80))]


def cells_of_numbers(found: DeepWindows, stride: int) -> dict[int, tuple[int, int, int]]:
    """Return the window and the row and column in the image, in cells, of each numbered cell."""
    places: dict[int, tuple[int, int, int]] = {}
    for n in chain(*found.batches):
        rows, columns = found.places[n]
        for y in range(rows.start // stride, rows.stop // stride):
            for x in range(columns.start // stride, columns.stop // stride):
                places[len(places)] = (n, y, x)
    return places


def inside(core: list[tuple[int, int]], y: int, x: int) -> bool:
    return all(first <= at < last for at, (first, last) in zip((y, x), core, strict=True))


def context_of(window: Place, y: int, x: int, stride: int) -> int:
    """Return the number of cells to the nearest edge of a window; 0 outside."""
    sides = zip((y, x), window, strict=True)
    distances: list[int] = [min(at - side.start // stride + 1, side.stop // stride - at) for at, side in sides]
    return max(0, min(distances))


@st.composite
def canvases(draw: st.DrawFn) -> list[Place]:
    """Return canvases whose cores are some of the cells of an irregular grid, so that they do not overlap."""
    sides = st.lists(st.integers(1, 3), min_size=2, max_size=4)
    rows, columns = (np.cumsum([32 * n for n in draw(sides)]).tolist() for _ in "yx")
    corners = [(y, x, below - y, right - x) for y, below in pairwise(rows) for x, right in pairwise(columns)]
    chosen = draw(st.lists(st.sampled_from(corners), min_size=1, unique=True))
    return [place(y + 96, x + 96, height, width) for y, x, height, width in chosen]


@given(canvases(), st.sampled_from([8, 16]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_order_of_canvases_does_not_matter(places: list[Place], stride: int, batch_size: int, rng: Random) -> None:
    order = rng.sample(range(len(places)), len(places))
    first = joined_windows(places, (2000, 2000), MARGIN, stride, batch_size)
    second = joined_windows([places[n] for n in order], (2000, 2000), MARGIN, stride, 1)
    where, also = cells_of_numbers(first, stride), cells_of_numbers(second, stride)
    for n, other in zip(order, second.cells, strict=True):
        ours = [where[number] for number in first.cells[n].ravel().tolist()]
        theirs = [also[number] for number in other.ravel().tolist()]
        assert ours == [(order[window], y, x) for window, y, x in theirs]


@given(canvases(), st.sampled_from([8, 16]), st.integers(1, 4))
def test_each_canvas_reads_one_common_map_in_which_a_core_has_its_own_features(
    places: list[Place], stride: int, batch_size: int
) -> None:
    found = joined_windows(places, (2000, 2000), MARGIN, stride, batch_size)
    sizes = [{tuple(side.stop - side.start for side in found.places[n]) for n in batch} for batch in found.batches]
    assert all(len(one) == 1 for one in sizes)
    assert max(map(len, found.batches)) <= batch_size
    assert sorted(chain(*found.batches)) == list(range(len(places)))
    where = cells_of_numbers(found, stride)
    common: dict[tuple[int, int], int] = {}
    known = {(y, x) for _, y, x in where.values()}
    cores = [
        [((side.start + MARGIN) // stride, (side.stop - MARGIN) // stride) for side in canvas] for canvas in places
    ]
    for n, (canvas, cells_hw) in enumerate(zip(places, found.cells, strict=True)):
        top, left = ((side.start - RING) // stride for side in canvas)
        assert cells_hw.shape == tuple((side.stop - side.start + 2 * RING) // stride for side in canvas)
        for (row, column), number in np.ndenumerate(cells_hw):
            y, x = top + row, left + column
            window, own_y, own_x = where[int(number)]
            assert common.setdefault((y, x), int(number)) == number
            if inside(cores[n], y, x):
                assert (window, own_y, own_x) == (n, y, x)
            elif (y, x) in known:
                assert (own_y, own_x) == (y, x)
                other_cores = [other for other, core in enumerate(cores) if inside(core, y, x)]
                assert other_cores in ([], [window])
                if not other_cores:
                    context = [context_of(one, y, x, stride) for one in found.places]
                    assert context[window] == max(context)
            else:  # the nearest cell of any window
                distance = (own_y - y) ** 2 + (own_x - x) ** 2
                assert distance == min((ky - y) ** 2 + (kx - x) ** 2 for ky, kx in known)


def test_lone_canvases_mirror_their_own_features() -> None:
    found = lone_windows((96, 128), 3, 32, 16, 2)
    assert found.batches == [[0, 1], [2]]
    assert found.places == [(slice(0, 96), slice(0, 128))] * 3
    assert found.cores == [(slice(16, 80), slice(16, 112))] * 3
    own = np.arange(48, 96, dtype=np.int32).reshape(6, 8)
    np.testing.assert_array_equal(found.cells[1], np.pad(own, 2, mode="reflect"))


def test_features_are_found_by_the_number_of_their_cell() -> None:
    first, second = torch.randn((2, 5, 2, 3)), torch.randn((1, 5, 4, 1))
    rows_TD = torch.cat([rows_of(first), rows_of(second)])
    numbers = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[11, 12, 15], [6, 8, 14]]], dtype=torch.int32)
    found = features_at(rows_TD, numbers)
    assert torch.equal(found[0], first[0])
    assert torch.equal(found[1, :, 0], torch.stack([first[1, :, 1, 2], second[0, :, 0, 0], second[0, :, 3, 0]], dim=1))
    assert torch.equal(found[1, :, 1, 2], second[0, :, 2, 0])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_border_between_canvases_shows_less_than_that_of_canvases_alone(batch_size: int) -> None:
    bundle = load_bundle("colon-gland")
    card = bundle.card.model_copy(update={"gate_thresholds": (0.0, 0.0), "familiarity": None})
    predictor = Predictor(card, NO_DIGEST, *load_networks(bundle), device="cpu", batch_size=batch_size)
    smooth_HWC = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(352, 352, 3)), (6, 6, 0))
    rgb_HWC = torch.from_numpy(np.clip(170 + 400 * smooth_HWC, 0, 255).astype(np.uint8))

    def probs(places: list[Place]) -> list[Tensor]:
        found = [torch.empty((2, *((side.stop - side.start - 2 * MARGIN) // 4 for side in one))) for one in places]
        predictor.predict_into(found, rgb_HWC, places, [(one[1].start, one[0].start) for one in places])
        return found

    assert card.margin == MARGIN
    (whole,) = probs([place(80, 80, 192, 192)])
    halves = [place(80, 80, 192, 96), place(80, 176, 192, 96)]
    joined = torch.cat(probs(halves), dim=2)
    corners = [(one[1].start, one[0].start) for one in halves]
    canvases = torch.stack([rgb_HWC[half] for half in halves])
    alone = torch.cat(list(predictor.predict(canvases, corners).probs_NKhw), dim=2)
    near = slice(20, 28)  # eight map pixels around the border
    error, other = (float((found - whole)[:, :, near].abs().mean()) for found in (joined, alone))
    assert error < 0.6 * other
    assert torch.equal(joined, torch.cat(probs(halves[::-1])[::-1], dim=2))


@pytest.mark.parametrize("margin", [48, *(pytest.param(other, marks=pytest.mark.full) for other in (16, 80))])
@pytest.mark.parametrize("depth", [3, 4])
def test_neither_batches_nor_skipping_change_canvases_of_several_sizes(margin: int, depth: int) -> None:
    cores = [(0, 0, 64, 96), (64, 32, 32, 64), (0, 96, 96, 32), (96, 64, 64, 64), (160, 128, 32, 32)]
    places = [place(y + 128, x + 128, height, width, margin) for y, x, height, width in cores]
    rng = np.random.default_rng(0)
    rgb_HWC = torch.from_numpy(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8))
    rgb_HWC[200:] = 255
    card = load_bundle("colon-gland").card.model_copy(update={"margin": margin, "familiarity": None})
    networks = sharing_networks(depth=depth)
    corners = [(128 + x, 128 + y) for y, x, _, _ in cores]

    def found(thresholds: tuple[float, float], **options: Any) -> tuple[list[Tensor], list[bool]]:
        own = card.model_copy(update={"gate_thresholds": thresholds})
        predictor = Predictor(own, NO_DIGEST, *networks, device="cpu", **options)
        probs = [torch.empty((2, height // 4, width // 4)) for _, _, height, width in cores]
        segmented, _ = predictor.predict_into(probs, rgb_HWC, places, corners)
        return probs, [bool(parts) for parts in segmented]

    presences = [one.flatten(0, 1) for one in _presences(card, networks, rgb_HWC, places, corners)]
    between = float(torch.cat(presences)[:, 1].median())
    for thresholds in ((0.0, 0.0), (0.0, between)):
        expected, segmented = found(thresholds, skip_by_gate=False)
        assert all(segmented)
        for batch_size in (1, 2, 8):
            probs, _ = found(thresholds, batch_size=batch_size)
            assert all(torch.equal(one, other) for one, other in zip(probs, expected, strict=True))


def _presences(
    card: ModelCard, networks: tuple[Any, Any], rgb_HWC: Tensor, places: list[Place], corners: list[tuple[int, int]]
) -> list[Tensor]:
    predictor = Predictor(card, NO_DIGEST, *networks, device="cpu")
    return [predictor.presence(rgb_HWC[one][None], [corner])[0] for one, corner in zip(places, corners, strict=True)]
