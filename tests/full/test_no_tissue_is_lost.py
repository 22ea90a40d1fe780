"""Attack the promise that no tissue is lost, and that nothing else counts as tissue.

Slides are painted in optical density (`tests/specimens.py`). One test uses CMU-1 at other densities than its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tests.specimens import EOSIN, HEMATOXYLIN, MPP, PENS, Color, Specimen, one_piece, scores, stained
from wsi import masks
from wsi.left_out import LeftOut
from wsi.slide import open_slide
from wsi.stain import glass_color
from wsi.thumbnail import read_thumbnail
from wsi.tissue import detect_tissue


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("stain", ["H&E", "blue counterstain", "trichrome blue", "methyl green", "DAB", "blood"])
def test_tissue_is_found_in_any_stain_pale_or_dark(stain: str, strength: float) -> None:
    specimen = one_piece(stain, strength)
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.9
    assert precision > 0.95
    assert not (found.left_out_HW[specimen.truth_HW] == LeftOut.FOLD).any()


@pytest.mark.parametrize(("width", "grain"), [(25, 0.0), (14, 0.0), (14, 0.1), (25, 0.15)])
@pytest.mark.parametrize("name", PENS)
def test_a_pen_is_not_tissue(name: str, width: int, grain: float) -> None:
    specimen = one_piece("H&E")
    pen_HW = specimen.stroke((190, 20), (260, 200), width)
    specimen.ink(pen_HW, PENS[name], grain)
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.95
    assert (found.left_out_HW[pen_HW] == LeftOut.PEN).mean() > 0.97


@pytest.mark.parametrize("color", [(20, 20, 22), (110, 110, 112)])
@pytest.mark.parametrize(("gap", "jpeg"), [(2, None), (6, None), (6, 60), (14, 60)])
@pytest.mark.parametrize("width", [6, 12, 25])
def test_black_ink_around_tissue_and_the_glass_between_are_not_tissue(
    width: int, gap: int, jpeg: int | None, color: tuple[int, int, int]
) -> None:
    specimen = Specimen((320, 320), seed=1)
    here_HW = specimen.blob(160, 160, 60)
    specimen.add(here_HW, stained((320, 320), specimen.rng, (HEMATOXYLIN, EOSIN)), tissue=True)
    ring_HW = masks.grow(here_HW, gap + width) & ~masks.grow(here_HW, gap)
    specimen.ink(ring_HW, color, grain=0.03)
    found = detect_tissue(specimen.image(jpeg=jpeg), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.95
    assert (found.left_out_HW[ring_HW] == LeftOut.DUST).mean() > 0.8


def test_fragments_of_112_um_are_tissue() -> None:
    specimen = Specimen((400, 300), seed=4)
    od_HWC = stained((300, 400), specimen.rng, (HEMATOXYLIN, EOSIN))
    for place in range(60):
        specimen.add(specimen.box(20 + place % 10 * 36, 20 + place // 10 * 40, 14, 14), od_HWC, tissue=True)
    found = detect_tissue(specimen.image(), MPP)
    assert scores(found.mask_HW, specimen)[0] > 0.97
    assert masks.pieces(found.mask_HW).number == 60


def test_tinted_glass_and_mountant_are_not_tissue() -> None:
    specimen = one_piece("H&E")
    recall, precision = scores(detect_tissue(specimen.image((243, 236, 219)), MPP).mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.95
    specimen = one_piece("H&E")
    mountant_HW = specimen.box(230, 0, 70, 220)
    specimen.add(mountant_HW, (0.004, 0.03, 0.105))
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.95
    assert (found.left_out_HW[mountant_HW] == LeftOut.TINT).mean() > 0.85


def test_the_black_border_of_a_scanner_is_not_tissue() -> None:
    specimen = one_piece("H&E")
    border_HW = specimen.box(0, 0, 300, 15) | specimen.box(0, 0, 10, 220)
    specimen.add(border_HW, (3.0, 3.0, 3.0))
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.94
    assert (found.left_out_HW[border_HW] == LeftOut.BORDER).mean() > 0.97


@pytest.mark.parametrize("variation", [0.05, 0.1])
@pytest.mark.parametrize("glass", [(244, 243, 244), (228, 230, 225), (250, 249, 243)])
@pytest.mark.parametrize("od", [(0.05, 0.09, 0.05), (0.06, 0.15, 0.08)])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_pale_pink_tissue_that_covers_more_than_the_glass_is_found(
    share: float, od: Color, glass: Color, variation: float
) -> None:
    specimen = Specimen((400, 300), seed=3)
    variation_HW = 1 + variation * specimen.rng.normal(0, 1, (300, 400))
    od_HWC = np.asarray(od) * ndimage.gaussian_filter(variation_HW, 0.7)[..., None]
    specimen.add(specimen.box(0, 0, round(400 * share), 300), od_HWC, tissue=True)
    recall, precision = scores(detect_tissue(specimen.image(glass, noise=0.7), MPP).mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.97


@pytest.mark.parametrize("strength", [0.4, 1.0, 2.0])
@pytest.mark.parametrize(("width", "density"), [(60, 3.0), (60, 1.0), (150, 2.0)])
def test_gray_tissue_that_touches_a_black_border_is_not_part_of_it(width: int, density: float, strength: float) -> None:
    specimen = Specimen((400, 300), seed=1)
    border_HW = specimen.box(0, 0, width, 300)
    here_HW = specimen.blob(width + 50, 150, 65) & ~border_HW
    od_HWC = stained((300, 400), specimen.rng, ((1.0, 1.0, 1.02), (0.6, 0.6, 0.61)), strength)
    specimen.add(border_HW, (density, density, density))
    specimen.add(here_HW, od_HWC, tissue=True)
    left_out_HW = detect_tissue(specimen.image(jpeg=80), MPP).left_out_HW
    assert (left_out_HW[border_HW] == LeftOut.BORDER).mean() > 0.97
    assert (left_out_HW[here_HW] == LeftOut.BORDER).mean() < 0.12
    assert (left_out_HW[here_HW] == LeftOut.DUST).mean() > 0.7


@pytest.mark.parametrize(("stain", "strength", "least"), [
    ("melanin", 1.0, 0.97), ("melanin", 0.3, 0.6), ("hematoxylin only", 1.0, 0.97), ("hematoxylin only", 0.3, 0.8),
])  # fmt: skip
def test_melanin_and_pale_hematoxylin_are_found_in_large_part(stain: str, strength: float, least: float) -> None:
    specimen = one_piece(stain, strength)
    found = detect_tissue(specimen.image(), MPP)
    recall, precision = scores(found.mask_HW, specimen)
    assert recall > least
    assert precision > 0.95


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("cell_px", [8, 12])
def test_fat_without_other_tissue_is_found(strength: float, cell_px: float) -> None:
    specimen = Specimen((300, 220), seed=2)
    specimen.fat(specimen.blob(110, 110, 80), strength, cell_px)
    recall, precision = scores(detect_tissue(specimen.image(jpeg=60), MPP).mask_HW, specimen)
    assert recall > 0.55
    assert precision > 0.95


def test_hair_dust_and_bubbles_are_not_fat() -> None:
    specimen = one_piece("H&E")
    for place in range(40):
        gray = specimen.rng.uniform(0.2, 1.2)
        spot_HW = specimen.blob(170 + place % 8 * 15, 20 + place // 8 * 40, specimen.rng.uniform(1, 4))
        specimen.add(spot_HW & ~specimen.truth_HW, (gray, gray, 0.97 * gray))
    bubble_HW = specimen.blob(240, 110, 40)
    specimen.add(bubble_HW & ~specimen.blob(240, 110, 36), (0.4, 0.4, 0.39))
    recall, precision = scores(detect_tissue(specimen.image(noise=5, jpeg=30), MPP).mask_HW, specimen)
    assert recall > 0.97
    assert precision > 0.94


@pytest.mark.shared
def test_dense_tissue_of_a_real_slide_stays_with_its_epidermis(shared_slides: Path) -> None:
    with open_slide(shared_slides / "CMU-1.svs") as slide:
        thumbnail = read_thumbnail(slide, MPP)
    glass = np.asarray(glass_color(thumbnail.rgb_HWC))
    od_HWC = np.log((glass + 1) / (np.minimum(thumbnail.rgb_HWC, glass) + 1))
    own = detect_tissue(thumbnail.rgb_HWC, MPP).mask_HW
    for strength in (1.2, 1.4, 1.6, 1.8, 2.2):
        dense_HWC = np.clip(np.round((glass + 1) * np.exp(-strength * od_HWC) - 1), 0, 255).astype(np.uint8)
        found = detect_tissue(dense_HWC, MPP)
        assert (found.mask_HW & own).sum() > 0.995 * own.sum()
        assert (found.left_out_HW == LeftOut.FOLD).sum() < 0.01 * own.sum()
