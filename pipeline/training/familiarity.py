"""Fit the statistics with which a model recognizes slides that do not resemble its training data.

Shape suffixes: N windows, C channels, H and W an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import nn

from models.bundle import Bundle, load_networks, replace_card
from models.card import NO_DIGEST, FamiliarityCard
from models.classifier import Classifier
from models.devices import choose_device
from models.familiarity import Statistics, fit_statistics, of_sources, window_features
from pipeline.errors import TrainError
from pipeline.training.augment import restain
from pipeline.training.inputs import Scale, as_input, padded
from pipeline.training.patches import PatchImages

MOST_IMAGES = 1500
"""Images of a split that are read. If there are more, every n-th is."""

FAMILIAR_SHARE = 0.99
"""Share of the validation windows that is familiar."""

SHARE_LIMIT = 0.5
"""Share of a slide's tissue above which the slide gets a warning; docs/benchmarks/familiarity.md measures it."""


Source = tuple[PatchImages, PatchImages]
"""Training and validation images of one kind: composed images, or all whole images of a data set that composed images
were cut from. Some of the latter can show tissue that no network was trained with."""


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

    `classifier` is a `Classifier` in eval mode. Every training image counts as it is and recolored, so that the stain
    of another laboratory does not make a slide unfamiliar. The limit comes from the validation images as they are. Each
    source has a mean and a covariance of its own: one Gaussian around mosaics and whole images would include everything
    between them. The result is deterministic. Raises TrainError if a split is empty.
    """
    assert isinstance(classifier, Classifier)
    place = choose_device(device)
    classifier.to(place)
    parts, held = [], []
    for training, validation in sources:
        if not (len(training) and len(validation)):
            raise TrainError(f"{training.dataset.card.name}: the training or validation split has no readable image")
        seen = list(_features(classifier, training, scale, place))
        seen += _features(classifier, training, scale, place, np.random.default_rng(0))
        statistics = fit_statistics(np.concatenate(seen))
        held.append(np.concatenate(list(_features(classifier, validation, scale, place))))
        parts.append((statistics, _limit(statistics, held[-1])))
    if len(parts) > 1:
        statistics = of_sources(parts)
    limit = _limit(statistics, np.concatenate(held))
    return statistics, FamiliarityCard(statistics=NO_DIGEST, window_limit=limit, share_limit=SHARE_LIMIT)


def _limit(statistics: Statistics, held_NC: NDArray[np.float32]) -> float:
    """Return the distance that nearly all of these windows stay below."""
    distance_N = statistics.distances(torch.from_numpy(held_NC)).numpy()
    # An untrained network can have equal features everywhere, and the limit must be positive.
    return max(round(float(np.quantile(distance_N, FAMILIAR_SHARE)), 4), 1e-4)


@torch.inference_mode()
def _features(
    classifier: Classifier,
    images: PatchImages,
    scale: Scale,
    device: torch.device,
    rng: np.random.Generator | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Yield the features (N, C) of the windows of each image, recolored if there is an `rng`."""
    every = -(-len(images) // MOST_IMAGES)
    for index in range(0, len(images), every):
        rgb_HWC = images.rgb(index) if rng is None else recolored(images.rgb(index), rng)
        x_NCHW = as_input(padded(rgb_HWC[None]), device, scale)
        deep_NChw = classifier.stages(x_NCHW).deep
        yield window_features(deep_NChw, x_NCHW.shape[2] // deep_NChw.shape[2]).flatten(0, 2).cpu().numpy()


def recolored(rgb_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image with another stain, brightness, contrast and saturation, as another laboratory may have them.

    Size and sharpness stay: a wrong pixel size and blur must remain unfamiliar.
    """
    picture = Image.fromarray(restain(rgb_HWC, 0.4, rng))
    for enhance, spread in ((ImageEnhance.Brightness, 0.15), (ImageEnhance.Contrast, 0.25), (ImageEnhance.Color, 0.4)):
        picture = enhance(picture).enhance(1 + rng.uniform(-spread, spread))
    return np.array(picture)
