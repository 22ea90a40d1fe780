"""The crops on which `tests.bench.cams` compares CAM methods.

Shape suffixes: B boxes, K classes, H and W space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.training.dataset import Dataset, labeled_boxes, read_mask, read_rgb, samples
from pipeline.training.dataset_sections import Split


class Crop(NamedTuple):
    """A labeled part of an image of the split."""

    rgb_HWC: NDArray[np.uint8]
    truth_HW: NDArray[np.uint8]
    present_K: NDArray[np.bool_]


def draw_crops(dataset: Dataset, split: Split, count: int, seed: int) -> list[Crop]:
    """Draw labeled crops that hold a class, from all of a split's images that have masks."""
    found = []
    for sample in samples(dataset, split):
        if sample.mask is not None:
            labeled = labeled_boxes(dataset, sample)
            found += [
                (sample, box_4, present_K)
                for box_4, present_K in zip(labeled.boxes_B4.tolist(), labeled.present_BK, strict=True)
                if present_K.any()
            ]
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    crops = []
    for sample, group in itertools.groupby((found[index] for index in sorted(chosen)), key=lambda entry: entry[0]):
        rgb_HWC, mask_HW = read_rgb(sample), read_mask(dataset, sample)
        for _, (x, y, width, height), present_K in group:
            box = slice(y, y + height), slice(x, x + width)
            crops.append(Crop(rgb_HWC[box], mask_HW[box], present_K))
    return crops


def batches(crops: Sequence[Crop], size: int) -> Iterator[list[Crop]]:
    """Split into batches of crops of one size."""
    for _, group in itertools.groupby(crops, key=lambda crop: crop.rgb_HWC.shape):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def choose_examples(crops: Sequence[Crop], count: int) -> list[tuple[int, int]]:
    """Return crops with a class each, the classes in turn: the crop that the class covers nearest to half of, so that
    there is something to find in it. A crop comes once.
    """
    chosen: dict[int, int] = {}
    for row in range(count):
        k = row % len(crops[0].present_K)
        left = [index for index, crop in enumerate(crops) if crop.present_K[k] and index not in chosen]
        if left:
            chosen[min(left, key=lambda index: abs(float((crops[index].truth_HW == k).mean()) - 0.5))] = k
    return list(chosen.items())
