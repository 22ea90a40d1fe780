from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from tests.slides import GLASS, PINK, PURPLE, painted, write_slide
from wsi import tissue as tissue_module
from wsi.box import Box
from wsi.slide import open_slide
from wsi.tissue import MASK_MPP, MAX_HOLE_UM2, MIN_FOLD_UM2, MIN_TISSUE_UM2, Tissue, find_tissue, read_thumbnail

SIZE = (1600, 1200)
"""At 2 µm per pixel: a slide of 3.2 mm × 2.4 mm."""


def tissue_of(tmp_path: Path, rgb_HWC: np.ndarray) -> Tissue:
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=2.0)) as slide:
        return find_tissue(slide)


def covered(tissue: Tissue, box: tuple[int, int, int, int]) -> float:
    """Return the share of a box (x, y, width and height in level-0 pixels) that is tissue."""
    x, y, width, height = (round(v / tissue.l0_per_px) for v in box)
    return float(tissue.mask_HW[y : y + height, x : x + width].mean())


def test_tissue_is_found_to_a_pixel_of_the_mask(tmp_path: Path) -> None:
    tissue = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), PINK), ((1200, 800, 200, 200), PURPLE)))
    assert tissue.mpp == pytest.approx(8.0)
    truth_um2 = (800 * 600 + 200 * 200) * 4
    assert tissue.area_um2 == pytest.approx(truth_um2, rel=0.03)
    assert covered(tissue, (216, 116, 768, 568)) == 1.0
    assert covered(tissue, (0, 0, 184, 1200)) == 0.0


def test_an_empty_slide_has_no_tissue(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = np.clip(painted(SIZE).astype(int) + rng.integers(-4, 5, (1200, 1600, 3)), 0, 255).astype(np.uint8)
    assert not tissue_of(tmp_path, painted(SIZE)).mask_HW.any()
    assert not tissue_of(tmp_path, noisy).mask_HW.any()


INKS = {
    "blue": (40, 80, 190),
    "green": (30, 150, 80),
    "black": (25, 25, 28),
    "red": (215, 45, 50),
    "cyan": (60, 160, 190),
    "gray dust": (150, 150, 148),
}


@pytest.mark.parametrize("name", INKS)
def test_ink_and_dust_are_not_tissue(tmp_path: Path, name: str) -> None:
    ink = (200, 900, 900, 120)
    tissue = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), PINK), (ink, INKS[name])))
    assert covered(tissue, (216, 116, 768, 568)) == 1.0
    assert covered(tissue, ink) < 0.005  # red ink's blurred rim looks like eosin


def test_small_pieces_are_debris_and_small_holes_are_tissue(tmp_path: Path) -> None:
    lumen, tear = (400, 300, 40, 40), (600, 300, 200, 200)  # 80 µm and 400 µm wide
    rgb_HWC = painted(SIZE, ((200, 100, 800, 600), PINK), ((1200, 400, 40, 40), PURPLE), (lumen, GLASS), (tear, GLASS))
    tissue = tissue_of(tmp_path, rgb_HWC)
    assert covered(tissue, (1190, 390, 60, 60)) == 0.0
    assert covered(tissue, lumen) == 1.0
    assert covered(tissue, (616, 316, 168, 168)) == 0.0


def test_a_fold_is_removed_and_its_area_returned_but_not_on_a_dark_slide(tmp_path: Path) -> None:
    dark, fold = (110, 20, 40), (400, 200, 60, 400)
    folded = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), PINK), (fold, dark)))
    assert covered(folded, (416, 216, 28, 368)) == 0.0
    assert folded.fold_um2 == pytest.approx(60 * 400 * 4, rel=0.2)
    assert folded.warnings == ()
    all_dark = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), dark)))
    assert covered(all_dark, (216, 116, 768, 568)) == 1.0
    assert all_dark.fold_um2 == 0
    assert "as dark as a fold" in all_dark.warnings[0]


def test_sampling_keeps_the_place_of_the_mask_and_adds_nothing_outside(tmp_path: Path) -> None:
    tissue = tissue_of(tmp_path, painted(SIZE, ((400, 400, 1200, 800), PINK)))
    fine = tissue.sample(Box(-50, -50, 900, 700), 2.0)  # 2 level-0 pixels per pixel, from (-100, -100)
    assert not fine[:50].any()
    assert not fine[:, :50].any()
    assert not fine[650:].any()
    rows, columns = np.nonzero(fine)
    assert abs(columns.min() - 250) <= 2
    assert abs(rows.min() - 250) <= 2
    # Tissue at the slide's own edge reaches the edge.
    assert (columns.max(), rows.max()) == (849, 649)
    np.testing.assert_array_equal(tissue.sample(Box(3, 5, 40, 30), tissue.l0_per_px), tissue.mask_HW[5:35, 3:43])


def test_the_real_sample_has_tissue_and_glass(sample_slide: Path) -> None:
    with open_slide(sample_slide) as slide:
        tissue = find_tissue(slide)
    assert 0.3 < tissue.mask_HW.mean() < 0.7
    assert tissue.area_um2 == pytest.approx(0.6e6, rel=0.1)


def plain_tissue(rgb_HWC: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.bool_], float]:
    """Return the mask and the area of folds by the rules of `find_tissue`, computed on the whole thumbnail."""

    def close(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.binary_closing(np.pad(mask_HW, 2, mode="edge"), iterations=2)[2:-2, 2:-2])

    def without_small(mask_HW: NDArray[np.bool_], min_um2: float) -> NDArray[np.bool_]:
        labels_HW, _ = ndimage.label(mask_HW)
        keep = np.bincount(labels_HW.ravel()) >= min_um2 / mpp**2
        keep[0] = False
        return np.asarray(keep[labels_HW])

    smooth_HWC = ndimage.gaussian_filter(rgb_HWC.astype(np.float32), sigma=(0.5, 0.5, 0), mode="nearest")
    red, green, blue = np.moveaxis(smooth_HWC, 2, 0)
    value_HW, least_HW = smooth_HWC.max(axis=2), smooth_HWC.min(axis=2)
    threshold = np.clip(threshold_otsu(np.round(value_HW - least_HW).astype(np.uint8)), 10.0, 20.0)
    ink_HW = (green > red + 5) | ((red - np.maximum(green, blue) > 100) & (blue - green < 15))
    mask_HW = without_small(close((value_HW - least_HW > threshold) & ~ink_HW), MIN_TISSUE_UM2)
    mask_HW = ~without_small(~mask_HW, MAX_HOLE_UM2)
    dark_HW = 1 - least_HW / np.maximum(value_HW, 1) - value_HW / 255 > 0.1
    fold_HW = without_small(close(mask_HW & dark_HW) & mask_HW, MIN_FOLD_UM2)
    return mask_HW & ~fold_HW, float(fold_HW.sum()) * mpp**2


@pytest.mark.parametrize("work_px", [1, 5000, 1 << 19])
def test_the_mask_found_in_strips_equals_that_of_the_whole_thumbnail(
    sample_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work_px: int
) -> None:
    monkeypatch.setattr(tissue_module, "WORK_PX", work_px)
    noise = np.random.default_rng(0).normal(0, 9, (*SIZE[::-1], 3))
    shapes = [((0, 100, 1000, 700), PINK), ((300, 200, 60, 400), (110, 20, 40)), ((1100, 900, 500, 300), PURPLE)]
    noisy_HWC = np.clip(painted(SIZE, *shapes, ((100, 300, 60, 90), INKS["blue"])) + noise, 0, 255).astype(np.uint8)
    for path in (sample_slide, write_slide(tmp_path / "noisy.svs", noisy_HWC, mpp=2.0)):
        with open_slide(path) as slide:
            tissue, thumbnail = find_tissue(slide), read_thumbnail(slide, MASK_MPP)
        mask_HW, fold_um2 = plain_tissue(thumbnail.rgb_HWC, tissue.mpp)
        np.testing.assert_array_equal(tissue.mask_HW, mask_HW)
        assert tissue.fold_um2 == fold_um2
    assert fold_um2 > 0


def test_memory_stays_at_a_few_bytes_per_pixel_of_the_mask(tmp_path: Path) -> None:
    size = (3600, 2800)
    rgb_HWC = painted(size, ((500, 500, 2000, 1500), PINK))
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=8.0)) as slide:
        tracemalloc.start()
        tissue = find_tissue(slide)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert tissue.mask_HW.shape == size[::-1]
    # Three bytes of color, four of labels, a few masks, and the strips that are processed.
    assert peak < 14 * size[0] * size[1] + (40 << 20)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(-40, 80), st.integers(-40, 80), st.integers(1, 60), st.integers(1, 60)),
    st.floats(0.1, 3.0),
    st.sampled_from([0.0, 0.5, 0.98, 1.0]),
)
def test_a_sampled_box_equals_that_part_of_the_sampled_whole(
    shape: tuple[int, int], box: tuple[int, int, int, int], l0_per_out: float, share: float
) -> None:
    mask_HW = np.random.default_rng(0).random(shape) < share
    tissue = Tissue(mask_HW, 1.0, 8.0, 0.0, ())
    padded_HW = np.pad(mask_HW, 1).astype(float)
    x, y, width, height = box
    found_HW = tissue.sample(Box(x, y, width, height), l0_per_out)
    rows, columns = ((np.arange(start, start + count) + 0.5) * l0_per_out for start, count in ((y, height), (x, width)))
    places = np.stack(np.meshgrid(rows + 0.5, columns + 0.5, indexing="ij"))
    value_HW = ndimage.map_coordinates(padded_HW, places, order=1, mode="constant")
    inside_HW = ((rows >= 0) & (rows < shape[0]))[:, None] & (columns >= 0) & (columns < shape[1])
    clear_HW = np.abs(value_HW - 0.5) > 1e-6
    np.testing.assert_array_equal(found_HW[clear_HW], ((value_HW > 0.5) & inside_HW)[clear_HW])
    assert not found_HW[~inside_HW].any()
