"""Attacks on borders: they follow what is drawn, at any place of a block, and leave neither gap nor overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.formats.polygons import block_regions, join_regions
from pipeline.slide.recipe import segment_slide
from tests.bench.edges import drawn, drawn_borders, wavy
from tests.pipeline.fakes import SMALL, color_predictor, labels_of, run_of
from tests.pipeline.formats.label_maps import smooth_map
from tests.slides import GLASS, write_slide


def test_borders_follow_the_drawn_ones_without_steps(tmp_path: Path) -> None:
    borders = drawn_borders(tmp_path)
    assert set(borders) == {"tissue", "lumen", "class"}
    for border in borders.values():
        assert border.distance_um < 12
        assert border.axis_parallel < 0.2


@pytest.mark.parametrize(("mpp", "margin"), [(1.0, 16), (1.0, 32), (0.25, 32)])
def test_the_border_does_not_depend_on_the_blocks(tmp_path: Path, mpp: float, margin: int) -> None:
    """Only the margin of 32 px of 1 µm is as wide as `edge_margin`. The others are narrower."""
    shapes = {"tissue": wavy(500, 480, 400, 5), "class": wavy(600, 500, 120, 4), "lumen": wavy(380, 380, 60, 3)}
    rgb_HWC, rng = drawn((1000, 960), shapes).copy(), np.random.default_rng(1)
    grain_HW1 = rng.integers(-6, 7, (*rgb_HWC.shape[:2], 1))
    # Gaps of the size of `GAP_UM` with narrow ends, which are decided by pixels as far away as `reach_px`.
    field_HW = ndimage.gaussian_filter(rng.standard_normal(rgb_HWC.shape[:2]), 6 / mpp)
    rgb_HWC[field_HW > np.quantile(field_HW, 0.8)] = GLASS
    path = write_slide(tmp_path / "a.svs", np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=mpp)
    model = color_predictor(mpp=mpp, margin=margin)
    found = []
    for block_out in (32, 48, 256):
        folder = segment_slide(path, tmp_path / str(block_out), model, replace(SMALL, block_out=block_out)).folder
        assert folder is not None
        found.append((labels_of(folder)[:240, :250], run_of(folder)["tissue_mm2"]))
    assert not found[0][0][90:100, 90:100].any(), "the lumen has no class"
    for labels_HW, tissue_mm2 in found[1:]:
        np.testing.assert_array_equal(labels_HW, found[0][0])
        assert tissue_mm2 == pytest.approx(found[0][1], abs=1e-12)


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 2.5, 6.0]), st.sampled_from([0.0, 20.0, 125.0]))
def test_smooth_borders_across_blocks_leave_neither_gap_nor_overlap(
    seed: int, sigma: float, min_area_px: float
) -> None:
    labels_HW = smooth_map(160, sigma, classes=3, seed=seed) + np.uint8(1)
    regions = [
        region
        for y in (0, 64, 128)
        for x in (0, 64, 128)
        for region in block_regions(labels_HW[y : y + 64, x : x + 64], (x, y), min_area_px, 1.0)
    ]
    polygons = np.array([region.geometry_out for region in join_regions(regions, 0)], dtype=object)
    assert shapely.is_valid(polygons).all()
    # Corners are multiples of 1/64, so that areas are exact.
    assert shapely.area(polygons).sum() == labels_HW.size
    assert shapely.union_all(polygons).equals(shapely.box(0, 0, 160, 160))
