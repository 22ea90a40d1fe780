from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.slides import GLASS, PINK, PURPLE, painted, write_slide
from wsi.grid import Box
from wsi.slide import open_slide
from wsi.tissue import Tissue, find_tissue

SIZE = (1600, 1200)
"""At 2 µm per pixel: a slide of 3.2 mm × 2.4 mm."""


def tissue_of(tmp_path: Path, rgb_HWC: np.ndarray) -> Tissue:
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=2.0)) as slide:
        return find_tissue(slide)


def covered(tissue: Tissue, box: tuple[int, int, int, int]) -> float:
    """Share of a box (level-0 x, y, width, height) that is tissue."""
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
    "grey dust": (150, 150, 148),
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


def test_a_fold_is_left_out_and_its_area_kept_but_not_on_a_dark_slide(tmp_path: Path) -> None:
    dark, fold = (110, 20, 40), (400, 200, 60, 400)
    folded = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), PINK), (fold, dark)))
    assert covered(folded, (416, 216, 28, 368)) == 0.0
    assert folded.fold_um2 == pytest.approx(60 * 400 * 4, rel=0.2)
    assert folded.warnings == ()
    all_dark = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), dark)))
    assert covered(all_dark, (216, 116, 768, 568)) == 1.0
    assert all_dark.fold_um2 == 0
    assert "as dark as a fold" in all_dark.warnings[0]


def test_sampling_keeps_the_mask_where_it_is_and_nothing_outside(tmp_path: Path) -> None:
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
