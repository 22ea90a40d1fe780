"""The images that a run trains on, and those that it validates on, which are held out if the data set names none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.errors import MissingImagesError
from pipeline.training.dataset import Dataset, Sample, samples
from pipeline.training.splits import hash_fraction

HELD_OUT = 0.2
"""Share of the training images that validate the training of a data set without a validation split."""

logger = logging.getLogger(__name__)


def training_samples(dataset: Dataset) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Return the images to train on, and the images to validate on.

    If the data set does not describe a split val, a share `HELD_OUT` of the training split is held out: whole groups by
    a hash of their names, or single images if there is only one group, with a warning if it has a name; see
    `_held_keys`. Raises the errors of `samples`, and MissingImagesError for a single image.
    """
    if "val" in dataset.card.splits:
        return samples(dataset, "train"), samples(dataset, "val")
    chosen = samples(dataset, "train")
    groups = {one.group for one in chosen}
    keys = [one.group if len(groups) > 1 else one.name for one in chosen]
    fractions = {key: hash_fraction(key) for key in keys}
    if len(fractions) == 1:
        raise MissingImagesError(
            f"{dataset.card.name}: cannot hold out images for validation, because there is only one training "
            "image; add images, or describe split val"
        )
    if len(groups) == 1 and groups != {""}:
        logger.warning(
            "%s: all training images belong to the group %s, so images of this group are held out for validation; "
            "scores for other groups may be lower; if you can, add images of other groups",
            dataset.card.name,
            *groups,
        )
    held = _held_keys(fractions, keys, chosen)
    training = tuple(one for one, key in zip(chosen, keys, strict=True) if key not in held)
    validation = tuple(one for one, key in zip(chosen, keys, strict=True) if key in held)
    logger.info("%d of %d training images are held out for validation", len(validation), len(chosen))
    return training, validation


def _held_keys(fractions: Mapping[str, float], keys: Sequence[str], chosen: Sequence[Sample]) -> set[str]:
    """Return the groups or images to hold out: those with a hash of at least 1 - `HELD_OUT`, or else the largest hash.

    The others must keep an image, and an image of every class if the labels are known without the masks. If no choice
    keeps every class, one group or image is held out anyway. `keys` has the group or name of each chosen image.
    """
    left: Counter[object] = Counter()
    own: dict[str, Counter[object]] = {key: Counter() for key in fractions}
    for key, one in zip(keys, chosen, strict=True):
        # None counts the images themselves.
        counted = [None, *(k for k, there in enumerate(one.labels_K or ()) if there)]
        own[key].update(counted)
        left.update(counted)
    held: set[str] = set()
    order = sorted(fractions, key=lambda key: -fractions[key])
    for key in order:
        if held and fractions[key] < 1 - HELD_OUT:
            break
        if all(left[what] > count for what, count in own[key].items()):
            left.subtract(own[key])
            held.add(key)
    return held or {order[0]}
