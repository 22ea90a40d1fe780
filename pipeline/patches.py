"""Patches of the EBHI-Seg copy as arrays, split by case, and the presence labels of crops that training starts from.

Shape suffixes: N patches, K classes, H and W space. Masks: 0 other, 1 gland, the order of `CLASS_NAMES`.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASS_NAMES = ("other", "gland")

Split = Literal["train", "val", "test"]


class PatchDataError(Exception):
    """The patch folder is incomplete or holds images that do not fit its masks."""


@dataclass(frozen=True)
class Patches:
    """Patches in memory; `masks_NHW` gives presence labels and, for held-out cases, the evaluation: nothing else."""

    names: tuple[str, ...]
    rgb_NHWC: NDArray[np.uint8]
    masks_NHW: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.names)


def split_of(case: str) -> Split:
    """Return the split of a case, 70/15/15 by a hash of its name: the same on every machine, whatever other cases there
    are.
    """
    fraction = int(hashlib.sha256(case.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if fraction < 0.70 else "val" if fraction < 0.85 else "test"


def load_patches(folder: Path, split: Split) -> Patches:
    """Return the patches of one split of an EBHI-Seg folder (meta.csv, img/*.webp, mask/*.png), decoded, in the order
    of meta.csv.

    Raises PatchDataError for a missing table or file, or a mask of another size than its image.
    """
    table = folder / "meta.csv"
    if not table.is_file():
        raise PatchDataError(f"{folder}: no meta.csv; pass the folder that holds meta.csv, img and mask")
    with table.open(newline="") as stream:
        names = [row["name"] for row in csv.DictReader(stream) if split_of(row["case"]) == split]
    if not names:
        raise PatchDataError(f"{table}: no patch falls into the {split} split; more cases are needed")
    images = [_read(folder / "img" / f"{name}.webp", "RGB") for name in names]
    masks = [_read(folder / "mask" / f"{name}.png", None) for name in names]
    for name, image, mask in zip(names, images, masks, strict=True):
        if image.shape[:2] != mask.shape or image.shape != images[0].shape:
            raise PatchDataError(
                f"{name}: image {image.shape[:2]}, mask {mask.shape}; all must be {images[0].shape[:2]}"
            )
    return Patches(tuple(names), np.stack(images), (np.stack(masks) > 0).astype(np.uint8))


def _read(file: Path, mode: str | None) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert(mode) if mode else image, dtype=np.uint8)
    except OSError as error:
        raise PatchDataError(f"{file}: cannot be read: {error}") from error


def subset(patches: Patches, count: int, rng: np.random.Generator) -> Patches:
    """Return `count` patches drawn without replacement, in their old order; all of them where there are no more."""
    picked = np.sort(rng.permutation(len(patches))[:count])
    return Patches(tuple(patches.names[n] for n in picked), patches.rgb_NHWC[picked], patches.masks_NHW[picked])


def presence(masks_NHW: NDArray[np.uint8], classes: int, minimum: float = 0.05) -> NDArray[np.bool_]:
    """Return which classes are present in each crop, (N, K): those that cover more than `minimum` of it (OEEM's rule
    for GlaS).
    """
    covered_NK = np.stack([(masks_NHW == k).mean(axis=(1, 2)) for k in range(classes)], axis=1)
    return covered_NK > minimum


def random_crops(
    patches: Patches, count: int, side: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return `count` crops (N, side, side, 3) at random places of random patches, and their masks for `presence`."""
    picked, xs, ys = _random_places(patches, count, side, rng)
    return _cut(patches, picked, xs, ys, side)


def balanced_crops(
    patches: Patches, count: int, side: int, classes: int, rng: np.random.Generator, candidates: int = 1500
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return `count` random crops as `random_crops`, each set of present classes that occurs among the candidates drawn
    equally often.

    Where one class is in nearly every crop a classifier learns to say so everywhere, and its map then beats every other
    class's.
    """
    picked, xs, ys = _random_places(patches, candidates, side, rng)
    step = max(1, side // 8)
    coarse_NHW = np.stack(
        [patches.masks_NHW[n, y : y + side : step, x : x + side : step] for n, x, y in zip(picked, xs, ys, strict=True)]
    )
    label_set_N = presence(coarse_NHW, classes) @ (1 << np.arange(classes))
    sets, index_N, counts = np.unique(label_set_N, return_inverse=True, return_counts=True)
    weight_N = 1.0 / (counts[index_N] * len(sets))
    chosen = rng.choice(candidates, size=count, p=weight_N)
    return _cut(patches, picked[chosen], xs[chosen], ys[chosen], side)


def _random_places(
    patches: Patches, count: int, side: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    height, width = patches.masks_NHW.shape[1:]
    picked = rng.integers(len(patches), size=count)
    return picked, rng.integers(width - side + 1, size=count), rng.integers(height - side + 1, size=count)


def _cut(
    patches: Patches, picked: NDArray[np.int64], xs: NDArray[np.int64], ys: NDArray[np.int64], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    boxes = list(zip(picked, xs, ys, strict=True))
    rgb_NHWC = np.stack([patches.rgb_NHWC[n, y : y + side, x : x + side] for n, x, y in boxes])
    masks_NHW = np.stack([patches.masks_NHW[n, y : y + side, x : x + side] for n, x, y in boxes])
    return rgb_NHWC, masks_NHW


def augment(
    rgb_NHWC: NDArray[np.uint8], labels_NLHW: NDArray[np.uint8] | None, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return the images flipped, turned by right angles and shifted in colour at random, each image in its own way;
    labels move along.

    Colour: a gain of 0.85–1.15 and an offset of ±15 per channel, the size of stain and scanner differences.
    """
    images, labels = [], []
    for n, image_HWC in enumerate(rgb_NHWC):
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        gain, offset = rng.uniform(0.85, 1.15, 3), rng.uniform(-15, 15, 3)
        moved = _move(image_HWC, turns, flip, axes=(0, 1))
        images.append(np.clip(moved * gain + offset, 0, 255).astype(np.uint8))
        if labels_NLHW is not None:
            labels.append(_move(labels_NLHW[n], turns, flip, axes=(1, 2)))
    return np.stack(images), np.stack(labels) if labels else None


def _move(array: NDArray[np.uint8], turns: int, flip: bool, axes: tuple[int, int]) -> NDArray[np.uint8]:
    turned = np.rot90(array, turns, axes)
    return np.flip(turned, axes[1]) if flip else turned
