"""The table "Where a change goes" of CONTRIBUTING.md: a part of each kind is added by one entry, and used.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.main import get_command

from models.cam import CAMS, CamMethod
from models.classifier import Classifier
from models.heads import HEADS, HeadOutput
from pipeline.batch.collect import collect_jobs
from pipeline.cli.segment import app
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError
from pipeline.training.presets import train_config
from pipeline.training.pseudo_masks import pseudo_masks_of_image
from tests.pipeline.training.cells import CellClassifier, crop_images
from wsi.box import Box
from wsi.errors import SlideFormatError
from wsi.readers import READERS
from wsi.slide import open_slide

CPU = torch.device("cpu")


def corner_cam(classifier: Classifier, x_NCHW: Tensor, layers: Sequence[str], chunk: int) -> list[Tensor]:
    """Return maps with class 1 in the right half of each image and class 0 in the left half."""
    del chunk
    maps = []
    for layer in layers:
        map_NKhw = torch.zeros(len(x_NCHW), 3, *getattr(classifier.stages(x_NCHW), layer).shape[2:])
        half = map_NKhw.shape[3] // 2
        map_NKhw[:, 0, :, :half] = map_NKhw[:, 1, :, half:] = 1.0
        maps.append(map_NKhw)
    return maps


def test_a_cam_method_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAMS, "corner-cam", CamMethod("Corner-CAM", corner_cam))
    config = train_config("default", None, ["cam=corner-cam", "layer_weights=[0.2, 0.2, 0.6]"])
    images = crop_images(tmp_path, {"a": (32, 32)})
    images.present = [np.array([[True, True, False]])]
    masks_LHW = pseudo_masks_of_image(CellClassifier("gap"), images, 0, config, CPU)
    assert masks_LHW.shape == (3, 32, 32)
    assert (masks_LHW[:, :, :12] == 0).all()
    assert (masks_LHW[:, :, 20:] == 1).all()


class MaxHead(nn.Module):
    """The maximum of each class map."""

    reads_images: ClassVar[bool] = False
    linear_map: ClassVar[bool] = True
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight_KC = nn.Parameter(torch.ones(classes, channels))

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # every head takes both
        map_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw, self.weight_KC)
        return HeadOutput(self.pooled(map_NKhw), map_NKhw)

    def pooled(self, map_NKhw: Tensor) -> Tensor:
        return map_NKhw.amax(dim=(2, 3))


def test_a_head_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "max", MaxHead)
    assert Classifier("resnet18", "max", 3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    images = crop_images(tmp_path, {"a": (32, 32)})
    for settings in (["head=max", "confidence=0"], ["head=max", "cam=cam"], ["head=max", "cam=grad-cam"]):
        config = train_config("default", None, settings)
        masks_LHW = pseudo_masks_of_image(CellClassifier("max"), images, 0, config, CPU)
        assert masks_LHW.shape == (1, 32, 32)


class ArrayReader:
    """Read one level of 8-bit RGB from a NumPy file."""

    suffixes: ClassVar[frozenset[str]] = frozenset({".npy"})

    def __init__(self, path: Path) -> None:
        self._rgb_HWC: NDArray[np.uint8] = np.load(path)
        height, width = self._rgb_HWC.shape[:2]
        self.level_sizes: tuple[tuple[int, int], ...] = ((width, height),)
        self.properties: Mapping[str, str] = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        assert level == 0
        return self._rgb_HWC[box_lv.y : box_lv.bottom, box_lv.x : box_lv.right]

    def close(self) -> None:
        pass


def test_a_reader_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb_HWC = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    path = tmp_path / "slide.npy"
    np.save(path, rgb_HWC)
    with pytest.raises(ConfigError, match="no slides in this folder"):
        collect_jobs([tmp_path])
    with pytest.raises(SlideFormatError, match="openslide or tiffslide"):
        open_slide(path)
    with pytest.raises(ConfigError, match="--backend is array; it must be auto or openslide or tiffslide"):
        SegmentConfig(backend="array")

    monkeypatch.setitem(READERS, "array", ArrayReader)
    assert [job.path for job in collect_jobs([tmp_path])] == [path]
    for backend in ("auto", SegmentConfig(backend="array").backend):
        with open_slide(path, backend=backend) as slide:
            assert (slide.info.backend, slide.info.mpp) == ("array", 0.5)
            np.testing.assert_array_equal(slide.read(0, Box(10, 20, 30, 25)).rgb_HWC, rgb_HWC[20:45, 10:40])


def test_help_lists_every_reader() -> None:
    (option,) = (parameter for parameter in get_command(app).params if parameter.name == "backend")
    assert all(name in getattr(option, "help", "") for name in ("auto", *READERS))
