from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.slide import canvases
from pipeline.slide.canvases import canvas_cores, with_margin
from tests.models.networks import make_card
from wsi.box import Box
from wsi.grid import Block, Grid, make_grid
from wsi.slide import SlideInfo

CARD = make_card(margin=32)
"""Of networks with backbones of their own."""


def grid_of(stride: int = 4, block_out: int = 64) -> Grid:
    size = (4096, 4096)
    info = SlideInfo(Path("a.svs"), "openslide", "aperio", (size,), 1.0, "slide", Box(0, 0, *size))
    return make_grid(info, model_mpp=1.0, output_stride=stride, block_out=block_out)


def blobs(seed: int, side: int, share: float) -> NDArray[np.bool_]:
    """Return a mask of square blobs and single pixels."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.random((8, 8)) < share, np.ones((side // 8, side // 8), bool)).astype(bool)
    return coarse | (rng.random((side, side)) < 0.001)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.sampled_from([128, 256, 896]),
    st.integers(0, 3),
)
def test_cores_cover_the_tissue_once_and_canvases_keep_their_size(
    seed: int, share: float, canvas_m: int, column: int
) -> None:
    grid, margin = grid_of(), 32
    block = Block(5, Box(64 * column, 128, 64, 64))
    tissue_HW = blobs(seed, 64, share)
    cores = canvas_cores(grid, tissue_HW, block, make_card(margin=margin), canvas_m)
    covered_HW = np.zeros_like(tissue_HW, dtype=int)
    for core in cores:
        assert all(value % 32 == 0 for value in core)
        assert max(with_margin(core, margin)[2:]) <= canvas_m
        covered_HW[grid.box_out(core).slices(block.box_out)] += 1
    assert covered_HW.max(initial=0) <= 1
    assert covered_HW[tissue_HW].all()
    assert not cores or tissue_HW.any()


def test_no_tissue_has_no_canvas() -> None:
    assert canvas_cores(grid_of(), np.zeros((64, 64), bool), Block(0, Box(0, 0, 64, 64)), CARD, 896) == []


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_full_block_is_cut_into_few_even_canvases(stride: int) -> None:
    side = 2048 // stride
    block = Block(0, Box(0, 0, side, side))
    cores = canvas_cores(grid_of(stride, side), np.ones((side, side), bool), block, CARD, 896)
    assert len(cores) == 9
    assert {core.width for core in cores} | {core.height for core in cores} == {672, 704}


def test_a_backbone_that_runs_in_windows_has_larger_canvases_unless_a_size_is_requested() -> None:
    block = Block(0, Box(0, 0, 1024, 1024))
    lite, other = (
        CARD.segmenter.model_copy(update={"shared_backbone": True, "encoder": f"tu-{encoder}"})
        for encoder in ("tf_efficientnet_lite0", "resnet18")
    )
    shared, whole = (CARD.model_copy(update={"segmenter": segmenter}) for segmenter in (lite, other))
    full_HW = np.ones((1024, 1024), bool)
    assert [len(canvas_cores(grid_of(4, 1024), full_HW, block, card)) for card in (CARD, shared, whole)] == [
        25,
        9,
        25,
    ]
    assert canvas_cores(grid_of(4, 1024), full_HW, block, shared, 896) == canvas_cores(
        grid_of(4, 1024), full_HW, block, CARD, 896
    )
    for card, largest in ((CARD, 896), (shared, 1792)):
        sides = [side for core in canvas_cores(grid_of(4, 1024), full_HW, block, card) for side in core[2:]]
        assert max(sides) + 2 * 32 <= largest


def test_two_distant_pieces_are_not_in_one_canvas() -> None:
    tissue_HW = np.zeros((256, 256), bool)
    tissue_HW[:16, :16] = True
    tissue_HW[200:, 240:] = True
    cores = canvas_cores(grid_of(4, 256), tissue_HW, Block(0, Box(0, 0, 256, 256)), CARD, 2048)
    assert cores == [Box(0, 0, 64, 64), Box(960, 800, 64, 224)]


def test_a_cut_is_worth_a_canvas_only_if_it_saves_more_than_the_canvas_takes() -> None:
    tissue_HW = np.zeros((256, 256), bool)
    tissue_HW[:, :128] = True
    block = Block(0, Box(0, 0, 256, 256))
    pieces = []
    # One canvas costs 34 * 34 + 20 = 1,176 cells. Cut below the 28th row, they cost 30 * 34 + 20 + 6 * 18 + 20 = 1,168.
    # Below the 29th row, they would have 1,144 cells instead of 1,156, but cost 1,184.
    for height in (8 * 28, 8 * 29):
        some_HW = tissue_HW.copy()
        some_HW[:height, 128:] = True
        pieces.append(len(canvas_cores(grid_of(4, 256), some_HW, block, CARD, 2048)))
    assert pieces == [2, 1]


def test_a_thin_border_is_worth_a_canvas_of_its_own_only_if_it_saves_pixels() -> None:
    tissue_HW = np.zeros((256, 256), bool)
    tissue_HW[:128, :128] = True
    tissue_HW[:8, 128:] = True  # a strip of 32 model pixels, 512 long
    strip = canvas_cores(grid_of(4, 256), tissue_HW, Block(0, Box(0, 0, 256, 256)), CARD, 2048)
    assert sorted(strip) == [Box(0, 0, 512, 512), Box(512, 0, 512, 32)]
    tissue_HW[:, 128:] = False
    tissue_HW[:120, 128:140] = True  # 48 wide and 480 long: a canvas of its own would have more margin
    assert canvas_cores(grid_of(4, 256), tissue_HW, Block(0, Box(0, 0, 256, 256)), CARD, 2048) == [Box(0, 0, 576, 512)]


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.sampled_from([(0.0, 3), (1.0, 4), (2.0, 9)])
)
def test_the_best_cut_is_the_cheapest_of_all_and_then_the_most_even(
    seed: int, height: int, width: int, canvas: tuple[float, int]
) -> None:
    has_RC = np.random.default_rng(seed).random((height, width)) < 0.3
    has_RC[[0, -1], 0] = has_RC[0, [0, -1]] = True  # its bounding box is the whole array
    margin, side = canvas
    cuts = [(math.inf, 0.0, 0, 0)]
    for axis, length in enumerate(has_RC.shape):
        parts = max(2, math.ceil(length / side))
        for position in range(1, length):
            boxes = [canvases._bounds(part) for part in np.split(has_RC, [position], axis=axis)]
            cost = sum(float(canvases._cost(box.height, box.width, margin, side)) for box in boxes if box)
            cuts.append((cost, abs(position - length * (parts // 2) / parts), axis, position))
    cost, _, axis, position = min(cuts)
    assert canvases._cuts(has_RC, margin, side, 1) == ([(cost, axis, position)] if position else [])
