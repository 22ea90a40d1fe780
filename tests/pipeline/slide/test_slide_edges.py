"""Tissue that ends at the edge of the slide, as in an exported region or a core of a microarray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import SegmentConfig
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from tests.slides import write_slide


def stripes(height: int, width: int) -> NDArray[np.uint8]:
    """Return an image of tissue colors without symmetry."""
    y, x = np.mgrid[:height, :width]
    wave_HW = np.sin(x / 7 + y / 23) + np.sin(y / 5 - x / 41)
    return np.stack([170 + 20 * wave_HW, 90 + 25 * wave_HW, 150 + 15 * wave_HW], axis=2).astype(np.uint8)


@pytest.mark.parametrize("size", [(200, 300), (241, 150)])
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
