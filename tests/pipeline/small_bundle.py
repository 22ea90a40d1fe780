"""A model bundle on disk, which other processes can load: small real networks with arbitrary weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import Bundle, load_networks, replace_card, save_bundle
from models.card import NO_DIGEST, ClassifierCard, FamiliarityCard, SegmenterCard
from models.classifier import Classifier
from models.familiarity import fit_changes, fit_statistics, textures, window_features
from models.segmenter import build_segmenter
from tests.models.networks import LITE, make_card, timm_networks
from tests.pipeline.fakes import COLORS, REGIONS
from tests.slides import painted, write_slide


def small_bundle(folder: Path, seed: int = 3) -> Bundle:
    """A bundle for classes in the slides' colors, with gate windows of 64 px; what it says depends on every pixel."""
    torch.manual_seed(seed)
    card = make_card(COLORS).model_copy(
        update={
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=3),
            "segmenter": SegmenterCard(encoder="resnet18", depth=4, rates=(1, 2, 4)),
            "gate_thresholds": (0.0, 0.0),
        }
    )
    networks = Classifier("tf_efficientnet_lite0", "gap", 2, 3), build_segmenter("resnet18", 2)
    return save_bundle(folder, card, *networks)


def stages_bundle(folder: Path) -> Bundle:
    """A bundle whose networks start with the same stages, like those that the default settings train."""
    card = make_card(COLORS).model_copy(
        update={
            "classifier": ClassifierCard(backbone=LITE, head="gap", depth=4),
            "segmenter": SegmenterCard(encoder=f"tu-{LITE}", depth=4, rates=(1, 2, 4)),
            "gate_thresholds": (0.0, 0.0),
        }
    )
    return save_bundle(folder, card, *timm_networks())


def speckled_slide(path: Path) -> Path:
    """`region_slide` with grain, so that no block is like another."""
    rgb_HWC = painted((1280, 832), *REGIONS)
    grain_HW1 = np.random.default_rng(1).integers(-12, 12, (*rgb_HWC.shape[:2], 1))
    return write_slide(path, np.clip(rgb_HWC + grain_HW1, 0, 255).astype(np.uint8), mpp=1.0)


def familiar_bundle(folder: Path, rgb_HWC: NDArray[np.uint8], scope: str = "paint, on glass") -> Bundle:
    """Return `small_bundle` with the statistics of an image, whose windows are all familiar."""
    bundle = small_bundle(folder)
    classifier = load_networks(bundle)[0]
    assert isinstance(classifier, Classifier)

    def features_NF(shift: int) -> Tensor:
        moved_HWC = np.roll(rgb_HWC, (shift, 3 * shift), axis=(0, 1))
        x_NCHW = torch.from_numpy(moved_HWC).permute(2, 0, 1)[None] / 255
        return window_features(textures(classifier.stages(x_NCHW)), 8).flatten(0, 2)

    with torch.inference_mode():
        familiar_NF = torch.cat([features_NF(shift) for shift in range(0, 128, 8)]).numpy()
        changed_NF = familiar_NF * np.random.default_rng(0).uniform(0.2, 3, familiar_NF.shape).astype(np.float32)
        changes = fit_changes([familiar_NF], [[changed_NF]]).scaled(-5, 5)
        statistics = dataclasses.replace(fit_statistics(familiar_NF), changes=changes)
        limit = 1.5 * float(max(statistics.distances(features_NF(shift)).max() for shift in (4, 44, 100)))
    familiarity = FamiliarityCard(statistics=NO_DIGEST, window_limit=limit, share_limit=0.5)
    card = bundle.card.model_copy(update={"familiarity": familiarity, "scope": scope})
    return replace_card(bundle, card, statistics)
