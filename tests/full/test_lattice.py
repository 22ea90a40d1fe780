"""Attacks on the promise that the grid of a run does not show in its map."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import shipped_bundles
from tests.bench.lattice import make_predictor, shifted_labels


def changed_share(slide: Path, model: str, margin: int | None) -> float:
    """Return the share of the labels inside the tissue that change if the grid moves by half a cell of a canvas.

    The networks' strides divide 16 pixels, so only canvases and gate windows move over the tissue.
    """
    predictor = make_predictor(model, margin, output_stride=1)
    before_HW, inside_HW, _ = shifted_labels(slide, predictor, 896, 0)
    after_HW, also_HW, _ = shifted_labels(slide, predictor, 896, 16)
    counted_HW = inside_HW[16:, 16:] & also_HW
    assert counted_HW.sum() > 200_000
    return float((before_HW[16:, 16:] != after_HW)[counted_HW].mean())


@pytest.mark.parametrize("model", shipped_bundles())
def test_a_shifted_grid_changes_few_labels(sample_slide: Path, model: str) -> None:
    share = changed_share(sample_slide, model, None)
    assert share < 0.005
    # Without real context, the borders of the canvases show: the attack can fail.
    assert changed_share(sample_slide, model, 16) > 2 * share
