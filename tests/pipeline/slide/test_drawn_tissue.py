from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.card import NO_DIGEST
from models.predictor import Predictor
from models.tissue_class import TissueClass
from pipeline.slide.drawn_tissue import area_px
from pipeline.slide.plan import plan_slide
from pipeline.slide.recipe import segment_slide
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.fakes import COLORS, SMALL, color_predictor, labels_of, run_of
from tests.slides import GLASS, PINK, PURPLE, painted, write_slide
from wsi.box import Box


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.floats(0.5, 14), st.floats(0.5, 14)),
)
def test_an_area_counts_the_part_of_each_pixel_inside_the_slide(
    seed: int, box: tuple[int, int, int, int], size_out: tuple[float, float]
) -> None:
    x, y, width, height = box
    mask_HW = np.random.default_rng(seed).random((height, width)) < 0.5
    expected = sum(
        max(0.0, min(1.0, size_out[0] - x - column)) * max(0.0, min(1.0, size_out[1] - y - row))
        for row, column in np.argwhere(mask_HW)
    )
    assert area_px(mask_HW, Box(*box), size_out) == pytest.approx(expected, abs=0.0006)


def test_a_slide_full_of_tissue_has_the_area_of_its_tissue(tmp_path: Path) -> None:
    """With 1,501 or 203 pixels, the last pixels of the mask and of the map reach beyond the slide."""
    path = write_slide(tmp_path / "slide.svs", painted((1501, 203), ((0, 0, 1501, 203), PINK)), mpp=1.0)
    planned = plan_slide(path, make_card(COLORS), SMALL)
    planned.slide.close()
    assert planned.tissue.area_um2 > 1501 * 203
    assert planned.plan.tissue_um2 == 1501 * 203
    folder = segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, block_out=128)).folder
    assert folder is not None
    run = run_of(folder)
    assert run["tissue_mm2"] == pytest.approx(1501 * 203e-6, abs=1e-8)
    assert run["class_areas_mm2"]["class-0"] == pytest.approx(run["tissue_mm2"], abs=1e-8)


def test_background_classes_are_not_tissue_and_holes_have_no_class(tmp_path: Path) -> None:
    boxes = ((64, 64, 640, 448), PINK), ((256, 192, 128, 128), PURPLE), ((512, 192, 64, 64), GLASS)
    path = write_slide(tmp_path / "slide.svs", painted((832, 640), *boxes), mpp=1.0)
    card = make_card(COLORS)
    classes = (card.classes[0], TissueClass("empty", COLORS[1], "background"))
    card = card.model_copy(update={"classes": classes})
    networks = ColorClassifier(COLORS), ColorSegmenter(COLORS, 400.0)
    folder = segment_slide(path, tmp_path / "out", Predictor(card, NO_DIGEST, *networks, device="cpu"), SMALL).folder
    assert folder is not None
    labels_HW, run = labels_of(folder), run_of(folder)
    assert not labels_HW[49:63, 129:143].any()
    assert labels_HW[20:120, 66:96].all()
    whole, background, hole = 640 * 448, 128 * 128, 64 * 64
    assert run["class_areas_mm2"]["empty"] == pytest.approx(background / 1e6)
    assert run["class_areas_mm2"]["class-0"] == pytest.approx((whole - background - hole) / 1e6)
    assert run["tissue_mm2"] == pytest.approx((whole - background - hole) / 1e6)
