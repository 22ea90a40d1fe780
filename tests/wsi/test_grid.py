from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.box import Box
from wsi.errors import ResolutionError
from wsi.grid import Grid, make_grid
from wsi.slide import SlideInfo


def info(
    size: tuple[int, int], mpp: float = 0.5, downsamples: tuple[int, ...] = (1,), bounds: Box | None = None
) -> SlideInfo:
    sizes = tuple((size[0] // d, size[1] // d) for d in downsamples)
    return SlideInfo(Path("slide.svs"), "openslide", "aperio", sizes, mpp, "slide", bounds or Box(0, 0, *size))


def grid(size: tuple[int, int], *, tile: int = 32, block: int = 16, mpp: float = 1.0) -> Grid:
    return make_grid(info(size, mpp=mpp), model_mpp=1.0, tile_m=tile, output_stride=4, block_out=block)


@given(st.integers(1, 900), st.integers(1, 700))
def test_blocks_partition_the_map(width: int, height: int) -> None:
    g = grid((width, height))
    boxes = [block.box_out.intersect(Box(0, 0, *g.size_out)) for block in g.blocks()]
    assert sum(b.width * b.height for b in boxes) == g.size_out[0] * g.size_out[1]
    assert [b.index for b in g.blocks()] == list(range(len(boxes)))
    corners = {(b.x, b.y) for b in boxes}
    assert len(corners) == len(boxes)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([32, 48, 100]))
def test_tiles_of_a_block_are_the_tiles_of_the_slide_that_overlap_it(width: int, height: int, tile: int) -> None:
    g = grid((width, height), tile=tile)
    every = g.tiles(Box(0, 0, g.size_out[0] + 16, g.size_out[1] + 16))
    # Every model pixel lies in a tile, and no tile starts beyond the slide.
    assert every[-1].right >= g.size_m[0]
    assert every[-1].bottom >= g.size_m[1]
    assert all(t.x == 0 or t.x < g.size_m[0] for t in every)
    for block in g.blocks():
        box_m = g.box_m(block.box_out)
        assert g.tiles(block.box_out) == [t for t in every if min(t.intersect(box_m)[2:]) > 0]


@given(st.integers(1, 400))
def test_tiles_cover_every_pixel_once(width: int) -> None:
    g = grid((width, 40))
    starts = sorted({t.x for t in g.tiles(Box(0, 0, g.size_out[0], 1))})
    assert starts[0] == 0
    assert all(b - a == g.tile_m for a, b in pairwise(starts))


def test_the_coarsest_level_that_is_fine_enough_is_read() -> None:
    slide = info((8000, 8000), mpp=0.25, downsamples=(1, 4, 16))
    chosen = {
        mpp: make_grid(slide, model_mpp=mpp, output_stride=4, block_out=1024) for mpp in (0.25, 0.5, 1.0, 2.0, 4.0)
    }
    assert {mpp: (g.level, g.lv_per_m) for mpp, g in chosen.items()} == {
        0.25: (0, 1.0),
        0.5: (0, 2.0),
        1.0: (1, 1.0),
        2.0: (1, 2.0),
        4.0: (2, 1.0),
    }


def test_a_pixel_size_within_two_percent_is_not_interpolated() -> None:
    g = make_grid(info((1000, 1000), mpp=0.499), model_mpp=1.0, output_stride=4, block_out=64)
    assert g.lv_per_m == 2.0
    assert g.mpp_m == pytest.approx(0.998)
    assert g.l0_per_out == 8.0
    odd = make_grid(info((1000, 1000), mpp=0.46), model_mpp=1.0, output_stride=4, block_out=64)
    assert odd.lv_per_m == pytest.approx(1 / 0.46)
    assert odd.mpp_out == pytest.approx(4.0)


def test_the_map_starts_at_the_corner_of_the_bounds() -> None:
    slide = info((4000, 4000), mpp=0.5, downsamples=(1, 2), bounds=Box(400, 600, 2000, 1000))
    g = make_grid(slide, model_mpp=1.0, output_stride=4, block_out=64)
    assert (g.level, g.origin_lv, g.size_m, g.size_out) == (1, (200, 300), (1000, 500), (250, 125))
    assert g.box_lv(Box(0, 0, 10, 10)) == Box(200, 300, 10, 10)
    assert g.box_l0(Box(0, 0, 10, 10)) == Box(400, 600, 20, 20)
    assert g.outer_box_m(Box(201, 302, 3, 4)) == Box(1, 2, 3, 4)


def test_a_slide_far_coarser_than_the_model_is_refused_by_name() -> None:
    with pytest.raises(ResolutionError, match=r"slide\.svs: 28\.97 µm/px \(source: slide\) is too coarse .*at most 4"):
        grid((1000, 1000), mpp=28.97)
