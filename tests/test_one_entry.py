"""The table "Where a change goes" of CONTRIBUTING.md: a part of each kind is added by one entry, and used.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.cam import CAMS, CamMethod
from models.classifier import Classifier
from models.heads import HEADS, HeadOutput
from pipeline.training.config import train_config
from pipeline.training.pseudo_masks import pseudo_masks_of_image
from tests.pipeline.training.cells import CellClassifier, crop_images

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

    linear_map: ClassVar[bool] = True
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight_KC = nn.Parameter(torch.ones(classes, channels))

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # every head takes both
        map_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw, self.weight_KC)
        return HeadOutput(map_NKhw.amax(dim=(2, 3)), map_NKhw)


def test_a_head_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "max", MaxHead)
    assert Classifier("resnet18", "max", 3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    images = crop_images(tmp_path, {"a": (32, 32)})
    for settings in (["head=max", "confidence=0"], ["head=max", "cam=cam"], ["head=max", "cam=grad-cam"]):
        config = train_config("default", None, settings)
        masks_LHW = pseudo_masks_of_image(CellClassifier("max"), images, 0, config, CPU)
        assert masks_LHW.shape == (1, 32, 32)
