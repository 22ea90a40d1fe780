"""Fine-tuning: both networks start from those of a model bundle.

Classes are matched by name. A class of the data set that the model has keeps its weights, in any order. Another class
starts new, and a class that only the model has is dropped. Everything else must be the same network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.bundle import Bundle, load_networks, segmenter_of
from models.card import ModelCard
from models.classifier import Classifier
from pipeline.errors import TrainConfigError, TrainError
from pipeline.training.config import TrainConfig

FINE_TUNING: dict[str, Any] = {"classifier_epochs": 6, "segmenter_epochs": 4, "new_rate": TrainConfig.backbone_rate}
"""Trained networks need fewer epochs, and a high rate would undo what their last layers have learned."""

HEAD_EPOCHS = 2
"""Default of `head_epochs` if the segmenter trained the backbone of the model."""


def start_settings(card: ModelCard, of_dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which a run can start from a model.

    Settings of the data set override `FINE_TUNING`, and those of the model's networks, which must not change, override
    both. `head_epochs` is 0 if the networks share no backbone. Its default is `HEAD_EPOCHS` if the segmenter trained
    the backbone.
    """
    settings = {**FINE_TUNING, **of_dataset, **_of_networks(card), "gate_stride": card.classifier.stride}
    # Without a shared backbone, a run would refuse the head_epochs of the data set.
    if not card.segmenter.shared_backbone:
        return settings | {"head_epochs": 0}
    return {"head_epochs": HEAD_EPOCHS, **settings} if card.segmenter.trains_backbone else settings


def _of_networks(card: ModelCard) -> dict[str, Any]:
    return {
        "backbone": card.classifier.backbone,
        "head": card.classifier.head,
        "depth": card.classifier.depth,
        "encoder": card.segmenter.encoder,
        "encoder_depth": card.segmenter.depth,
        "rates": card.segmenter.rates,
        "decoder_channels": card.segmenter.decoder_channels,
        "shared_backbone": card.segmenter.shared_backbone,
        "mean": card.mean,
        "std": card.std,
        "mpp": card.mpp,
    }


def check_start(bundle: Bundle, config: TrainConfig, classes: Sequence[str]) -> None:
    """Raise TrainConfigError if a setting differs from the bundle's, and TrainError if they share no class."""
    for name, value in _of_networks(bundle.card).items():
        own = config.encoder_name if name == "encoder" else getattr(config, name)
        if own != value:
            raise TrainConfigError(
                f"{name} is {own}, but the model {bundle.card.name} has {value}; omit this setting, or train without "
                "--init"
            )
    names = [one.name for one in bundle.card.classes]
    if not set(names) & set(classes):
        raise TrainError(
            f"the model {bundle.card.name} has the classes {', '.join(names)}, and the data set {', '.join(classes)}; "
            "at least one must have the same name: rename a class, or train without --init"
        )


def start_from_bundle(bundle: Bundle, classifier: Classifier, segmenter: nn.Module, classes: Sequence[str]) -> None:
    """Copy the weights of a bundle into the networks of a run. Heads of single layers keep their own weights.

    Raises BundleError if the weights cannot be read.
    """
    card = bundle.card
    names = [one.name for one in card.classes]
    pairs = [(names.index(name), k) for k, name in enumerate(classes) if name in names]
    # Twins with one more class show which axes of which tensors stand for classes.
    more = len(names) + 1
    with torch.device("meta"):
        twins = (
            Classifier(card.classifier.backbone, card.classifier.head, more, card.classifier.depth),
            segmenter_of(card.segmenter, more),
        )
    for own, stored, twin in zip((classifier, segmenter), load_networks(bundle), twins, strict=True):
        target, larger = own.state_dict(), twin.state_dict()
        for name, tensor in stored.state_dict().items():
            copy_classes(target[name], tensor, larger[name].shape, pairs)


def copy_classes(own: Tensor, stored: Tensor, larger: Sequence[int], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy a tensor. Along the axes in which its shape differs from `larger`, copy class `old` to class `new` of pairs.

    The values of classes that no pair names stay as they are.
    """
    old, new = (torch.tensor(part, dtype=torch.long) for part in zip(*pairs, strict=True))
    axes = [axis for axis, (size, other) in enumerate(zip(stored.shape, larger, strict=True)) if size != other]
    if not axes:
        own.copy_(stored)
        return
    kept = stored
    for axis in axes:
        kept = kept.index_select(axis, old)
    places = [new if axis in axes else torch.arange(size) for axis, size in enumerate(own.shape)]
    own[torch.meshgrid(*places, indexing="ij")] = kept


def with_start(config: TrainConfig, init: Bundle | None) -> TrainConfig:
    """Return the settings of a run with the digest of the bundle that it starts from.

    Raises TrainConfigError if the settings name a bundle that is not the given one.
    """
    digest = "" if init is None else init.digest
    if config.init not in ("", digest):
        raise TrainConfigError(f"the setting init is {config.init}; omit it, and pass the model itself with --init")
    return dataclasses.replace(config, init=digest)
