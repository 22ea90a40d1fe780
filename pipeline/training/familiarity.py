"""Fit the statistics with which a model recognizes slides that do not resemble its training data.

Shape suffixes: N windows, C channels, H and W an image.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from models.bundle import Bundle, load_networks, replace_card
from models.card import NO_DIGEST, FamiliarityCard
from models.classifier import Classifier
from models.devices import choose_device, compiles_sizes, native_convolutions
from models.familiarity import Statistics, fit_changes, fit_statistics, of_sources, textures, window_features
from pipeline.errors import TrainError
from pipeline.training.augment import restain
from pipeline.training.changes import CHANGES
from pipeline.training.inputs import Scale, as_input, padded
from pipeline.training.patches import PatchImages

logger = logging.getLogger(__name__)

MOST_IMAGES = 1500
"""Images of a split that are read. If there are more, every n-th is."""

MOST_CHANGED = 375
"""Images of a split that are changed in each way of `CHANGES`."""

COPIES = 3
"""Recolored copies of each training image."""

FAMILIAR_SHARE = 0.995
"""Share of the validation windows that is familiar. docs/benchmarks/familiarity.md compares it with 0.99."""

SHARE_LIMIT = 0.45
"""Share of a slide's tissue above which the slide gets a warning; docs/benchmarks/familiarity.md measures it."""


Source = tuple[PatchImages, PatchImages]
"""Training and validation images of one kind: composed images, or all whole images of another data set that `compose`
names. If composed images were cut from these, some can show tissue that no network was trained with."""


def add_familiarity(bundle: Bundle, sources: Sequence[Source], scope: str, device: str = "auto") -> Bundle:
    """Fit the familiarity of an existing bundle on the images of its training, and store it in the bundle.

    `scope` is that of the card. Raises TrainError if a split is empty, and what `load_networks` raises.
    """
    statistics, familiarity = fit_familiarity(load_networks(bundle)[0], sources, bundle.card, device)
    card = bundle.card.model_copy(update={"familiarity": familiarity, "scope": scope})
    return replace_card(bundle, card, statistics)


def fit_familiarity(
    classifier: nn.Module, sources: Sequence[Source], scale: Scale, device: str
) -> tuple[Statistics, FamiliarityCard]:
    """Return the statistics of the training images and their part of the model card.

    `classifier` is a `Classifier` in eval mode. Every training image counts as it is and in `COPIES` other colors, so
    that the stain of another laboratory does not make a slide unfamiliar. Recolored images that were changed by one of
    `CHANGES` teach what wrong colors, blur and wrong pixel sizes look like. All limits come from the unchanged
    validation images.

    Each source has a mean and a covariance of its own: one Gaussian around mosaics and whole images would include
    everything between them. The distance from the nearest source and the evidence of a change are added. Between the
    median of the validation windows and the value that `FAMILIAR_SHARE` of these windows stay below, each part grows by
    1. The result is deterministic. Raises TrainError if a split is empty.
    """
    assert isinstance(classifier, Classifier)
    place = choose_device(device)
    classifier.to(place)

    def features(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        with native_convolutions(compiles_sizes(place, classifier)):
            return np.concatenate([image_features(classifier, rgb_HWC, scale, place) for rgb_HWC in images])

    familiar, held, parts = [], [], []
    changed: list[list[NDArray[np.float32]]] = [[] for _ in CHANGES]
    for training, validation in sources:
        if not (len(training) and len(validation)):
            raise TrainError(f"{training.dataset.card.name}: the training or validation split has no readable image")
        logger.info(
            "%s: fitting the familiarity check to %d images, including changed copies; this can take minutes on a CPU",
            training.dataset.card.name,
            passes(len(training), len(validation)),
        )
        rng = np.random.default_rng(0)
        copies = [features(recolored(rgb_HWC, rng) for rgb_HWC in _images(training)) for _ in range(COPIES)]
        familiar.append(np.concatenate([features(_images(training)), *copies]))
        for of_kind, change in zip(changed, CHANGES.values(), strict=True):
            images = _images(training, MOST_CHANGED)
            of_kind.append(features(change(recolored(rgb_HWC, rng), rng) for rgb_HWC in images))
        held.append(features(_images(validation)))
        statistics = fit_statistics(familiar[-1])
        parts.append((statistics, _median_and_limit(statistics.distances(torch.from_numpy(held[-1])))[1]))
    held_NC = torch.from_numpy(np.concatenate(held))
    plain = of_sources(parts)
    median, limit = _median_and_limit(plain.distances(held_NC))
    changes = fit_changes(familiar, changed)
    changes = changes.scaled(*_median_and_limit(changes.logits(held_NC)))
    statistics = dataclasses.replace(plain.scaled(1 / (limit - median)), changes=changes)
    window_limit = round(_median_and_limit(statistics.distances(held_NC))[1], 4)
    return statistics, FamiliarityCard(statistics=NO_DIGEST, window_limit=window_limit, share_limit=SHARE_LIMIT)


def passes(training: int, validation: int) -> int:
    """Return how many images and changed copies `fit_familiarity` reads, for these numbers of images of a source."""
    return (
        len(_read(training)) * (1 + COPIES) + len(CHANGES) * len(_read(training, MOST_CHANGED)) + len(_read(validation))
    )


def _median_and_limit(values_N: Tensor) -> tuple[float, float]:
    """Return the median of the validation windows, and the value that `FAMILIAR_SHARE` of them stay below."""
    median, limit = np.quantile(values_N.numpy(), [0.5, FAMILIAR_SHARE]).tolist()
    # Few windows, or an untrained network, can have equal values, but distances are divided by this difference.
    return median, max(limit, median + max(1e-4, 0.01 * abs(median)))


def _images(images: PatchImages, most: int = MOST_IMAGES) -> Iterator[NDArray[np.uint8]]:
    for index in _read(len(images), most):
        yield images.rgb(index)


def _read(count: int, most: int = MOST_IMAGES) -> range:
    """Return at most `most` of `count` indices, evenly spaced."""
    return range(0, count, -(-count // most))


@torch.inference_mode()
def image_features(
    classifier: Classifier, rgb_HWC: NDArray[np.uint8], scale: Scale, device: torch.device
) -> NDArray[np.float32]:
    """Return the features (N, C) of the windows of an image."""
    x_NCHW = as_input(padded(rgb_HWC[None]), device, scale)
    textures_NEhw = textures(classifier.stages(x_NCHW))
    features_NrcC = window_features(textures_NEhw, x_NCHW.shape[2] // textures_NEhw.shape[2])
    features_NC: NDArray[np.float32] = features_NrcC.flatten(0, 2).cpu().numpy()
    return features_NC


def recolored(rgb_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image with another stain, brightness, contrast and saturation, as another laboratory may have them.

    Size and sharpness stay: a wrong pixel size and blur must remain unfamiliar.
    """
    picture = Image.fromarray(restain(rgb_HWC, 0.4, rng))
    for enhance, spread in ((ImageEnhance.Brightness, 0.15), (ImageEnhance.Contrast, 0.25), (ImageEnhance.Color, 0.4)):
        picture = enhance(picture).enhance(1 + rng.uniform(-spread, spread))
    return np.array(picture)
