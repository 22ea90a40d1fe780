"""The border of the tissue at a map's resolution: its place, its gaps, and that a part equals the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from tests.slides import GLASS, PINK, PURPLE, painted, reduce, write_slide
from wsi.box import Box
from wsi.left_out import LeftOut
from wsi.slide import open_slide
from wsi.tissue import Tissue, find_tissue
from wsi.tissue_edge import fine_tissue, possible_tissue, reach_px

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

SIDE = 800
"""Pixels of 2 µm of a slide. Its maps have pixels of 4 µm."""


def fine(tmp_path: Path, rgb_HWC: Image) -> tuple[Tissue, Mask]:
    """Return the mask of a slide with pixels of 2 µm, and its tissue at 4 µm per pixel."""
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=2.0)) as slide:
        tissue = find_tissue(slide)
    height, width = (length // 2 for length in rgb_HWC.shape[:2])
    return tissue, fine_tissue(tissue, reduce(rgb_HWC, 2), Box(0, 0, width, height), 2.0, 4.0)


def colored(mask_HW: Mask) -> Image:
    return np.where(mask_HW[..., None], PINK, GLASS).astype(np.uint8)


def disk(x: float, y: float, radius: float) -> Mask:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.asarray((rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2)


def test_the_border_lies_on_the_tissue_to_a_pixel_of_the_map(tmp_path: Path) -> None:
    truth_HW = disk(403.3, 397.1, 280)
    tissue, fine_HW = fine(tmp_path, colored(truth_HW))
    assert tissue.mpp == 8.0
    share_HW = truth_HW.reshape(SIDE // 2, 2, -1, 2).mean(axis=(1, 3))
    assert fine_HW[share_HW >= 0.5].all()
    assert not fine_HW[share_HW == 0].any()
    coarse_HW = tissue.sample(Box(0, 0, SIDE // 2, SIDE // 2), 2.0)
    assert np.count_nonzero(coarse_HW != fine_HW) > 200


def test_a_lumen_is_taken_out_and_a_crack_is_not(tmp_path: Path) -> None:
    lumen_HW = disk(300, 400, 25)
    crack_HW = np.zeros_like(lumen_HW)
    crack_HW[200:600, 500:506] = True
    rgb_HWC = colored(disk(400, 400, 300) & ~lumen_HW & ~crack_HW)
    tissue, fine_HW = fine(tmp_path, rgb_HWC)
    assert tissue.sample(Box(140, 190, 20, 20), 2.0).all(), "the mask has no hole"
    assert not fine_HW[ndimage.binary_erosion(lumen_HW, iterations=3)[::2, ::2]].any()
    assert fine_HW[150:250, 245:255].all()


def test_fat_keeps_its_cells_and_the_tissue_beside_it_loses_its_holes(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    cell_HW = (rows % 30 >= 4) & (columns % 30 >= 4)  # cells of 52 µm between strands of 8 µm
    fat_HW = (columns < 400) & cell_HW
    tissue_HW = (disk(400, 400, 340) & ~fat_HW) & ~disk(560, 400, 20)
    tissue, fine_HW = fine(tmp_path, colored(tissue_HW))
    inner_HW = disk(400, 400, 280)[::2, ::2]
    assert fine_HW[:, :170][inner_HW[:, :170]].mean() > 0.99
    assert not fine_HW[195:205, 275:285].any()
    assert tissue.fat_HW.any()
    assert not tissue.fat_HW[:, 125:].any()


def test_stained_pixels_beside_the_mask_are_added_and_pen_is_not(tmp_path: Path) -> None:
    # The tissue ends 2 µm after a pixel of the mask begins: a quarter of that pixel is too little for the mask.
    rgb_HWC = painted((SIDE, SIDE), ((160, 160, 401, 400), PURPLE))
    tissue, fine_HW = fine(tmp_path, rgb_HWC)
    coarse_HW = tissue.sample(Box(0, 0, SIDE // 2, SIDE // 2), 2.0)
    assert not coarse_HW[100:200, 280].any()
    assert fine_HW[100:200, 280].all()
    tissue.left_out_HW[:, 140:] = LeftOut.PEN
    again_HW = fine_tissue(tissue, reduce(rgb_HWC, 2), Box(0, 0, SIDE // 2, SIDE // 2), 2.0, 4.0)
    assert not again_HW[100:200, 280].any()


def test_a_hole_that_is_darker_than_glass_belongs_to_the_tissue(tmp_path: Path) -> None:
    red, green, blue = (round(value * 0.94) for value in GLASS)
    rgb_HWC = painted((SIDE, SIDE), ((160, 160, 400, 400), PINK), ((320, 320, 44, 44), (red, green, blue)))
    _, fine_HW = fine(tmp_path, rgb_HWC)
    assert fine_HW[81:279, 81:279].all()


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 2.0, 4.0, 16.0]),
    st.tuples(st.integers(-5, 30), st.integers(-5, 30), st.integers(1, 40), st.integers(1, 40)),
)
def test_a_part_of_the_border_equals_that_of_the_whole(seed: int, mpp: float, part: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    cells = max(1, round(mpp * 70 / 8)) + 1
    blobs_HW = ndimage.gaussian_filter(rng.standard_normal((cells, cells)), 1.0) > -0.1
    left_out_HW = (rng.random((cells, cells)) < 0.1).astype(np.uint8)
    tissue = Tissue(blobs_HW, left_out_HW, 8.0, 8.0, (), GLASS, blobs_HW & (rng.random((cells, cells)) < 0.2))
    whole = Box(-20, -20, 110, 110)
    bright_HW = ndimage.gaussian_filter(rng.standard_normal((whole.height, whole.width)), 1.5) > 0
    rgb_HWC = np.where(bright_HW[..., None], GLASS, PURPLE).astype(np.uint8)
    whole_HW = fine_tissue(tissue, rgb_HWC, whole, mpp, mpp)
    reach, box = reach_px(mpp), Box(*part)
    outer = Box(box.x - reach, box.y - reach, box.width + 2 * reach, box.height + 2 * reach)
    # Beyond the whole, more glass: no place inside it may depend on that.
    around_HWC = np.full((outer.height, outer.width, 3), GLASS, np.uint8)
    common = outer.intersect(whole)
    around_HWC[common.slices(outer)] = rgb_HWC[common.slices(whole)]
    part_HW = fine_tissue(tissue, around_HWC, outer, mpp, mpp)
    inside = Box(whole.x + reach, whole.y + reach, whole.width - 2 * reach, whole.height - 2 * reach).intersect(box)
    np.testing.assert_array_equal(part_HW[inside.slices(outer)], whole_HW[inside.slices(whole)])
    possible_HW = possible_tissue(tissue, box, mpp, mpp)
    assert not (part_HW[box.slices(outer)] & ~possible_HW).any()
