"""What a run trains on and trains: the checked images of its splits, and the networks with their initial weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from models.bundle import Bundle
from models.cam import check_available
from models.classifier import Classifier
from models.segmenter import build_segmenter, share_backbone
from pipeline.errors import TrainConfigError, TrainError
from pipeline.training.classifier import build_classifier
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, Sample, check_images
from pipeline.training.gate_calibration import UNCALIBRATED, gate_window, warn_of_uncalibrated
from pipeline.training.held_out import training_samples
from pipeline.training.inputs import MULTIPLE
from pipeline.training.model_card import make_card
from pipeline.training.patches import CACHE_BYTES, PatchImages, at_pixel_sizes
from pipeline.training.segmenter import start_encoder
from pipeline.training.start import check_start, start_from_bundle, with_start
from pipeline.training.taught_classes import check_classes

logger = logging.getLogger(__name__)

SMALLEST_PATCH = 8
"""Smallest side of a labeled patch in pixels: a cell of the classifier's map in training."""

UNREADABLE_SHARE = 0.01
"""The run fails if a larger share of the images of a split cannot be read."""


class Parts(NamedTuple):
    """What a run trains, and on which images. The networks have their initial weights."""

    config: TrainConfig
    """With the pixel size of the data set if the settings have none."""
    training: PatchImages
    by_size: list[PatchImages]
    """The training images at each pixel size at which the classifier is trained."""
    validation: PatchImages
    classifier: Classifier
    segmenter: nn.Module


def prepare(dataset: Dataset, config: TrainConfig, init: Bundle | None = None) -> Parts:
    """Read the labels and build the networks, and check everything that can be checked before training.

    With `init`, both networks start from those of a bundle, see `pipeline.training.start`. Raises TrainConfigError
    for settings that contradict each other or the bundle, TrainError for data that do not fit, DatasetError for bad
    data, and ModelError if a network cannot be built.
    """
    if config.head_epochs and not config.shared_backbone:
        # Not checked in TrainConfig, because the data set or the model to start from may set shared_backbone.
        advice = "set head_epochs=0" if init is not None else "set shared_backbone=true, or head_epochs=0"
        raise TrainConfigError(
            f"head_epochs is {config.head_epochs}, which has no effect without shared_backbone; {advice}"
        )
    config = with_start(dataclasses.replace(config, mpp=config.mpp or dataset.mpp), init)
    if init is not None:
        check_start(init, config, dataset.class_names)
    assert config.mpp is not None
    training, validation = training_images(dataset, config.mpp)
    by_size = at_pixel_sizes(training, config.classifier_mpp)
    _check(training, by_size, validation, config)
    torch.manual_seed(config.seed)
    classes = len(dataset.class_names)
    classifier = build_classifier(config, classes)
    if config.cam != "head":
        check_available(config.cam, classifier.eval(), "deep")
    # Built before the first stage, so that its random weights do not depend on whether that stage ran or was skipped.
    segmenter = build_segmenter(
        config.encoder_name,
        classes,
        config.encoder_depth,
        config.rates,
        config.decoder_channels,
        keeps_backbone=config.keeps_backbone,
    )
    if config.shared_backbone:
        share_backbone(segmenter, classifier)  # checks before training that they are the same network
    else:
        start_encoder(segmenter, config)
    if init is not None:
        start_from_bundle(init, classifier, segmenter, dataset.class_names)
    make_card(dataset, config, gate_window(training), (UNCALIBRATED,) * classes)
    return Parts(config, training, by_size, validation, classifier, segmenter)


def training_images(dataset: Dataset, mpp: float, *, cache_bytes: int = CACHE_BYTES) -> tuple[PatchImages, PatchImages]:
    """Return the images of the training and of the validation split, each with a cache of up to `cache_bytes`.

    Raises DatasetError for bad data.
    """

    def readable(chosen: Sequence[Sample]) -> PatchImages:
        found = check_images(chosen, UNREADABLE_SHARE)
        return PatchImages(dataset, found, mpp, cache_bytes=cache_bytes, unreadable=len(chosen) - len(found))

    training, validation = training_samples(dataset)
    return readable(training), readable(validation)


def _check(training: PatchImages, by_size: Sequence[PatchImages], validation: PatchImages, config: TrainConfig) -> None:
    """Raise TrainError if the classifier cannot be trained and validated on these images.

    Log a warning about classes without a validation patch.
    """
    for images in (training, validation):
        if not len(images):
            raise TrainError(f"{images.dataset.card.name}: the training or validation split has no readable image")
    if training not in by_size:  # its patches are gate windows; only the last stage draws regions of it
        _check_patches(training, config.region if config.head_epochs else None, "mpp")
    for images in by_size:
        _check_patches(images, config.region, "classifier_mpp" if config.classifier_mpp else "mpp")
    # Validation patches may differ in size if each one passes the network alone.
    if config.region is not None:
        _check_one_size(validation)
    groups = [sample.group for sample in validation.samples]
    check_classes(training.dataset, training.present, validation.present, groups)
    warn_of_uncalibrated(validation)


def _check_patches(training: PatchImages, region: int | None, setting: str) -> None:
    """Raise TrainError if the labeled patches are not squares of one size, or do not fit the network or the region.

    `setting` is the one that determines the pixel size.
    """
    _check_one_size(training)
    width, height = training.boxes[0][0, 2:].tolist()
    if width != height:
        raise TrainError(
            f"{training.dataset.card.name}: the labeled patches are {width}x{height} px, but quarter turns need "
            "squares; crop the images, or label crops of them"
        )
    at = f"at {training.dataset.mpp / training.scale:.4g} µm/px"
    if width < SMALLEST_PATCH:
        raise TrainError(
            f"{training.dataset.card.name}: the labeled patches are {width} px {at}; the classifier needs at least "
            f"{SMALLEST_PATCH} px, so set a finer {setting}"
        )
    if region is not None and width > region:
        raise TrainError(
            f"region is {region} px, but the labeled patches are {width} px {at}; set region to "
            f"{-(-width // MULTIPLE) * MULTIPLE} or more, or set a coarser {setting}"
        )


def _check_one_size(images: PatchImages) -> None:
    sides = {tuple(side) for boxes_B4 in images.boxes for side in boxes_B4[:, 2:].tolist()}
    if len(sides) > 1:
        raise TrainError(
            f"{images.dataset.card.name}: the labeled patches have {len(sides)} sizes, such as {min(sides)} and "
            f"{max(sides)} px; resize the images to one size"
        )
