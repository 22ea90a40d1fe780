"""Tissue that ends at the edge of the slide, as in an exported region or a core of a microarray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import SegmentConfig
from pipeline.results.slide_result import SlideResult
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from tests.slides import write_slide
from wsi.box import Box
from wsi.grid import make_grid, whole_pixels_m
from wsi.slide import SlideInfo


def stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Return an image of tissue colors without symmetry."""
    y, x = np.mgrid[:height, :width]
    wave_HW = np.sin(x / 7 + y / 23) + np.sin(y / 5 - x / 41)
    return np.stack([170 + 20 * wave_HW, 90 + 25 * wave_HW, 150 + 15 * wave_HW], axis=2).astype(np.uint8)


def stored_labels(result: SlideResult) -> NDArray[np.uint8]:
    assert result.folder is not None
    file = result.folder / f"{result.slide}.ome.zarr" / "labels" / "classes" / "0"
    return np.asarray(zarr.open_array(file, mode="r")[:], dtype=np.uint8)


@pytest.mark.parametrize("size", [(200, 300), (241, 150), (257, 130)])
def test_the_networks_see_mirror_images_beyond_the_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    seen: list[NDArray[np.uint8]] = []
    config = SegmentConfig(device="cpu", runtime="torch")
    predictor = load_predictor("colorectal-tissue", config)
    on_device = predictor.on_device

    def record(rgb_HWC: NDArray[np.uint8]) -> Tensor:
        seen.append(rgb_HWC.copy())
        return on_device(rgb_HWC)

    monkeypatch.setattr(predictor, "on_device", record)
    image_HWC = stripes(*size)
    slide = write_slide(tmp_path / "core.svs", image_HWC, mpp=1.0)
    segment_slide(slide, tmp_path / "results", predictor, config)
    (canvas_HWC,) = seen
    # The only canvas has equal margins at the left and at the top, and reaches further at the right and at the bottom.
    top = next(n for n in range(canvas_HWC.shape[0]) if (canvas_HWC[n] == canvas_HWC[n + 1]).all()) + 1
    left = next(n for n in range(canvas_HWC.shape[1]) if (canvas_HWC[:, n] == canvas_HWC[:, n + 1]).all()) + 1
    beyond = [
        (before, whole - before - side)
        for before, whole, side in zip((top, left), canvas_HWC.shape, image_HWC.shape, strict=False)
    ]
    np.testing.assert_array_equal(canvas_HWC, np.pad(image_HWC, [*beyond, (0, 0)], mode="symmetric"))


@pytest.mark.full
def test_the_map_covers_the_same_pixels_as_with_white_beyond_the_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = write_slide(tmp_path / "core.svs", stripes(200, 300), mpp=1.0)
    config = SegmentConfig(device="cpu", runtime="torch")
    predictor = load_predictor("colorectal-tissue", config)
    mirrored = segment_slide(slide, tmp_path / "mirrored", predictor, config)
    monkeypatch.setattr("pipeline.slide.blocks.mirror_outside", lambda *_: None)
    white = segment_slide(slide, tmp_path / "white", predictor, config)
    labels = [stored_labels(result) for result in (mirrored, white)]
    np.testing.assert_array_equal(labels[0] > 0, labels[1] > 0)
    assert (labels[0] != labels[1]).any()


@pytest.mark.parametrize(
    ("bounds_l0", "mpp", "whole_m"),
    [
        (Box(0, 0, 1000, 800), 0.5, (500, 400)),
        (Box(0, 0, 1001, 801), 0.5, (500, 400)),
        (Box(100, 50, 300, 200), 0.5, (150, 100)),
        (Box(0, 0, 1001, 777), 0.37, (370, 287)),
        (Box(0, 0, 3000, 2100), 1 / 3, (1000, 700)),
        (Box(0, 0, 1, 9), 0.5, (0, 4)),
    ],
)
def test_whole_pixels_end_inside_the_bounds(bounds_l0: Box, mpp: float, whole_m: tuple[int, int]) -> None:
    size = (bounds_l0.right + 70, bounds_l0.bottom + 30)
    info = SlideInfo(Path("a.svs"), "openslide", "aperio", (size,), mpp, "slide", bounds_l0)
    grid = make_grid(info, model_mpp=1.0, output_stride=4, block_out=64)
    assert whole_pixels_m(info, grid) == Box(0, 0, *whole_m)
