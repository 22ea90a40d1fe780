"""Small classifiers whose features are cells of 8×8 pixels, and images to train them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone import Stages
from models.classifier import Classifier
from models.heads import HEADS
from pipeline.training.dataset import load_dataset, samples
from pipeline.training.patches import PatchImages
from tests.textures import write_crops


class Cells(nn.Module):
    """Three different feature maps of 8×8 px cells, each independent of its surroundings."""

    channels = 6
    stage_channels = (6, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Conv2d(3, 6, 8, stride=8), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)])

    def forward(self, x_NCHW: Tensor) -> Stages:
        shallow = self.net[0](x_NCHW).relu()
        middle = self.net[1](shallow).relu()
        return Stages(shallow, middle, self.net[2](middle).relu())


class CellClassifier(Classifier):
    """A classifier on `Cells` with random weights."""

    def __init__(self, head: str, classes: int = 3, seed: int = 0, layers: Sequence[str] = ()) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(seed)
        self.backbone = Cells()  # type: ignore[assignment]  # as a Backbone, but smaller
        self.head = HEADS[head](Cells.channels, classes)
        self.layer_heads = nn.ModuleDict({layer: HEADS[head](Cells.channels, classes) for layer in layers})
        self.mu = None
        self.normalize_attention = True
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.eval()


def noise_images(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def crop_images(folder: Path, sizes: dict[str, tuple[int, int]], *, side: int = 32, stride: int = 16) -> PatchImages:
    dataset = load_dataset(write_crops(folder, sizes, side=side, stride=stride))
    return PatchImages(dataset, samples(dataset, "train"), dataset.mpp)
