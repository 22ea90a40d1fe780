"""A model bundle on disk, which other processes can load: small real networks with arbitrary weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.bundle import Bundle, ClassifierCard, SegmenterCard, save_bundle
from models.classifier import Classifier
from models.segmenter import build_segmenter
from tests.models.networks import make_card
from tests.pipeline.fakes import COLORS, REGIONS
from tests.slides import painted, write_slide


def small_bundle(folder: Path, seed: int = 3) -> Bundle:
    """A bundle for classes in the slides' colors, with 64-px tiles; what it says depends on every pixel."""
    torch.manual_seed(seed)
    card = make_card(COLORS).model_copy(
        update={
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=3),
            "segmenter": SegmenterCard(encoder="resnet18"),
            "gate_thresholds": (0.0, 0.0),
        }
    )
    networks = Classifier("tf_efficientnet_lite0", "gap", 2, 3), build_segmenter("resnet18", 2)
    return save_bundle(folder, card, *networks)


def speckled_slide(path: Path) -> Path:
    """`region_slide` with grain, so that no block is like another."""
    rgb_HWC = painted((1280, 832), *REGIONS)
    grain_HW1 = np.random.default_rng(1).integers(-12, 12, (*rgb_HWC.shape[:2], 1))
    return write_slide(path, np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=1.0)
