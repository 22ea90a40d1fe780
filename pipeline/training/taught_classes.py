"""Check that the training patches of a data set contain every class.

Shape suffixes: B boxes, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EmptyClassError
from pipeline.training.dataset import Dataset


def check_classes(
    dataset: Dataset,
    training: Sequence[NDArray[np.bool_]],
    validation: Sequence[NDArray[np.bool_]] = (),
    groups: Sequence[str] = (),
) -> None:
    """Raise EmptyClassError if a class is in none of the training patches, because a classifier cannot learn it.

    `training` and `validation` have the classes (B, K) in the patches of each image, and `groups` the group of each
    validation image, or "".
    """
    name, names = dataset.card.name, dataset.class_names
    patches = sum(map(len, training))
    empty = set(range(len(names))) - {k for present_BK in training for k in np.flatnonzero(present_BK.any(axis=0))}
    for k in sorted(empty):
        holding = [n for n, present_BK in enumerate(validation) if present_BK[:, k].any()]
        if not holding:
            continue
        of = ", ".join(sorted({groups[n] for n in holding} - {""}))
        place = "in split val" if "val" in dataset.card.splits else "held out for validation"
        raise EmptyClassError(
            f"{name}: all images of class {names[k]}{f' (group(s) {of})' if of else ''} are {place}; add training "
            f"images of this class{' from other groups' if of else ''}, or set the splits yourself"
        )
    if empty:
        lacking = ", ".join(names[k] for k in sorted(empty))
        raise EmptyClassError(
            f"{name}: none of the {patches} training patches contains class {lacking}; check "
            "the order of the classes and their mask values, or remove the class from the dataset.toml (in a labels "
            "folder, with wsi-label classes --remove)"
        )
