from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.slides import GLASS, PINK, PURPLE, painted, write_slide
from tests.specimens import MPP, PENS, Specimen, od_of, one_piece, scores
from wsi import masks
from wsi.box import Box
from wsi.left_out import LeftOut
from wsi.slide import open_slide
from wsi.stain import DEFAULT_GLASS
from wsi.tissue import Tissue, detect_tissue, find_tissue

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


def test_tissue_at_the_far_end_of_a_strip_is_in_its_place(tmp_path: Path) -> None:
    # 403 px are 25 px of the coarsest level, whose sides are rounded down, and 16,000 px are 1,000.
    strip_HWC = painted((16000, 403), ((12800, 0, 2560, 403), PINK))
    with open_slide(write_slide(tmp_path / "strip.svs", strip_HWC, mpp=0.25, levels=(1, 4, 16))) as slide:
        tissue = find_tissue(slide)
    columns = np.flatnonzero(tissue.mask_HW[4:8].all(axis=0)) * tissue.l0_per_px
    assert tissue.l0_per_px == 32
    assert (columns[0], columns[-1] + 32) == (12800, 15360)


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


def test_small_pieces_are_fragments_and_small_holes_are_tissue(tmp_path: Path) -> None:
    lumen, tear = (400, 300, 40, 40), (600, 300, 200, 200)  # 80 µm and 400 µm wide
    rgb_HWC = painted(SIZE, ((200, 100, 800, 600), PINK), ((1200, 400, 16, 16), PURPLE), (lumen, GLASS), (tear, GLASS))
    tissue = tissue_of(tmp_path, rgb_HWC)
    assert covered(tissue, (1190, 390, 60, 60)) == 0.0
    assert tissue.left_out[LeftOut.FRAGMENT].pieces == 1
    assert tissue.left_out[LeftOut.FRAGMENT].area_um2 == 32**2
    assert covered(tissue, lumen) == 1.0
    assert covered(tissue, (616, 316, 168, 168)) == 0.0


def doubled(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the color of two layers of a color on `GLASS`."""
    red, green, blue = (round(value**2 / glass) for value, glass in zip(color, GLASS, strict=True))
    return red, green, blue


def test_a_fold_stays_in_the_map_and_is_a_layer_unless_it_is_excluded(tmp_path: Path) -> None:
    fold = (400, 200, 60, 400)
    rgb_HWC = painted(SIZE, ((200, 100, 800, 600), PINK), (fold, doubled(PINK)))
    with open_slide(write_slide(tmp_path / "slide.svs", rgb_HWC, mpp=2.0)) as slide:
        kept, excluded = find_tissue(slide), find_tissue(slide, exclude_folds=True)
    assert covered(kept, fold) == 1.0
    assert kept.left_out[LeftOut.FOLD].area_um2 == pytest.approx(60 * 400 * 4, rel=0.2)
    assert kept.left_out[LeftOut.FOLD].pieces == 1
    assert kept.warnings == ("folds cover 5% of the tissue and stay in the map; --exclude-folds leaves them out",)
    assert covered(excluded, (416, 216, 28, 368)) == 0.0
    assert excluded.area_um2 == pytest.approx(kept.area_um2 - kept.left_out[LeftOut.FOLD].area_um2)
    assert excluded.warnings == ("folds cover 5% of the tissue and are left out",)


def test_a_dark_slide_has_no_folds(tmp_path: Path) -> None:
    tissue = tissue_of(tmp_path, painted(SIZE, ((200, 100, 800, 600), (110, 20, 40))))
    assert covered(tissue, (216, 116, 768, 568)) == 1.0
    assert tissue.left_out[LeftOut.FOLD].pieces == 0


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
    assert tissue.area_um2 == pytest.approx(0.65e6, rel=0.05)


@pytest.mark.parametrize(("work_px", "patch_rows"), [(1, 1), (5000, 7), (1 << 19, 1000)])
def test_the_mask_found_in_strips_equals_that_of_the_whole_thumbnail(
    monkeypatch: pytest.MonkeyPatch, work_px: int, patch_rows: int
) -> None:
    specimen = one_piece("H&E", size=(240, 180), radius=70)
    specimen.od_HWC[specimen.box(50, 80, 70, 8) & specimen.truth_HW] *= 3
    specimen.add(specimen.stroke((5, 165), (230, 165), 14), od_of(PENS["pink"]))
    specimen.add(specimen.box(0, 0, 240, 10), (3, 3, 3))
    specimen.add(specimen.blob(200, 60, 4), (0.5, 0.5, 0.5))
    rgb_HWC = specimen.image()
    whole = detect_tissue(rgb_HWC, MPP)
    monkeypatch.setattr(masks, "WORK_PX", work_px)
    monkeypatch.setattr(masks, "PATCH_ROWS", patch_rows)
    in_strips = detect_tissue(rgb_HWC, MPP)
    np.testing.assert_array_equal(in_strips.mask_HW, whole.mask_HW)
    np.testing.assert_array_equal(in_strips.left_out_HW, whole.left_out_HW)
    kinds = set(np.unique(whole.left_out_HW).tolist())
    assert kinds == {0, LeftOut.FOLD, LeftOut.PEN, LeftOut.DUST, LeftOut.BORDER}


@pytest.mark.parametrize(("stain", "strength"), [("methyl green", 0.3), ("blue counterstain", 1.0), ("H&E", 2.0)])
def test_tissue_is_found_in_stains_that_pens_resemble(stain: str, strength: float) -> None:
    specimen = one_piece(stain, strength)
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.9
    assert precision > 0.95


@pytest.mark.parametrize(("name", "grain"), [("green", 0.0), ("violet", 0.1)])
def test_a_pen_is_not_tissue(name: str, grain: float) -> None:
    specimen = one_piece("H&E")
    pen_HW = specimen.stroke((190, 20), (260, 200), 14)
    specimen.ink(pen_HW, PENS[name], grain)
    found = detect_tissue(specimen.image(), MPP)
    assert scores(found.mask_HW, specimen)[1] > 0.95
    assert (found.left_out_HW[pen_HW] == LeftOut.PEN).mean() > 0.97


def test_fat_is_tissue_and_a_hair_is_not() -> None:
    specimen = Specimen((300, 220), seed=1)
    specimen.fat(specimen.blob(90, 110, 60))
    specimen.add(specimen.stroke((180, 20), (290, 200), 3), (0.5, 0.5, 0.48))
    recall, precision = scores(detect_tissue(specimen.image(), MPP).mask_HW, specimen)
    assert recall > 0.7
    assert precision > 0.95


def test_gray_structure_is_counted_and_makes_a_slide_unrecognized(tmp_path: Path) -> None:
    specimen = one_piece("H&E")
    gray_HWC = np.repeat(specimen.image().mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    with open_slide(write_slide(tmp_path / "gray.svs", gray_HWC, mpp=MPP)) as slide:
        tissue = find_tissue(slide)
    assert not tissue.mask_HW.any()
    assert tissue.has_unrecognized_structure
    found_um2 = tissue.left_out[LeftOut.DUST].area_um2
    assert found_um2 == pytest.approx(specimen.truth_HW.sum() * MPP**2, rel=0.1)
    assert tissue.warnings == (
        f"no tissue was recognized, but the slide has structure (dust {found_um2 / 1e6:.2f} mm²); look at the slide",
    )


@pytest.mark.parametrize(("brightness", "radius"), [(20, 60), (40, 15), (0, 60)])
def test_a_slide_with_a_dark_background_is_unrecognized(tmp_path: Path, brightness: int, radius: int) -> None:
    specimen = one_piece("H&E", radius=radius)
    rgb_HWC = np.repeat(4 + brightness * specimen.truth_HW[..., None], 3, axis=2).astype(np.uint8)
    with open_slide(write_slide(tmp_path / "dark.svs", rgb_HWC, mpp=MPP)) as slide:
        tissue = find_tissue(slide)
    assert not tissue.mask_HW.any()
    assert tissue.has_unrecognized_structure
    assert tissue.warnings == ("no tissue was recognized, and 100% of the slide is black; is it a bright-field slide?",)


def test_an_empty_slide_with_a_black_border_is_not_unrecognized(tmp_path: Path) -> None:
    with open_slide(write_slide(tmp_path / "s.svs", painted((300, 200), ((0, 0, 120, 200), (3, 3, 3))), mpp=MPP)) as s:
        tissue = find_tissue(s)
    assert tissue.left_out[LeftOut.BORDER].area_um2 == pytest.approx(0.4 * 300 * 200 * MPP**2, rel=0.05)
    assert not tissue.has_unrecognized_structure
    assert tissue.warnings == ()


def test_a_whole_slide_full_of_tissue_gives_a_warning(tmp_path: Path) -> None:
    with open_slide(write_slide(tmp_path / "s.svs", painted((700, 700), ((0, 0, 700, 600), PINK)), mpp=8.0)) as slide:
        assert find_tissue(slide).warnings == (
            "tissue covers 86% of the slide; check that glass does not count as tissue",
        )
    cutout = write_slide(tmp_path / "cutout.svs", painted((400, 400), ((0, 0, 400, 360), PINK)), mpp=8.0)
    with open_slide(cutout) as slide:
        assert find_tissue(slide).warnings == ()


def test_much_left_out_beside_little_tissue_gives_a_warning(tmp_path: Path) -> None:
    ink = (200, 900, 900, 120)
    tissue = tissue_of(tmp_path, painted(SIZE, ((200, 100, 400, 300), PINK), (ink, INKS["blue"])))
    assert [warning[:40] for warning in tissue.warnings] == ["much was left out beside the tissue (pen"]


@pytest.mark.full
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
    tissue = Tissue(mask_HW, np.zeros(shape, np.uint8), 1.0, 8.0, (), DEFAULT_GLASS, mask_HW)
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
