"""Patches whose labels are known from masks, for the simulation of labeling (tests/bench/label_order.py).

Patches are those of wsi-label: squares of 64 px of about 1 µm on a grid, without overlap. A class is present in a patch
if it covers more than 5 % of it. The features of a patch are the means of a classifier's deep feature map over the
patch.

Shape suffixes: N patches, I images, F features, K classes, H and W an image, h and w its feature map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from pipeline.training.compose import composed
from pipeline.training.dataset import Dataset, Sample, load_dataset, samples
from pipeline.training.dataset_sections import CropLabels
from pipeline.training.inputs import as_input, padded
from pipeline.training.patches import PatchImages
from tests.bench.colorectal import SLIDES, fold
from tests.bench.training_stride import training_classifier

SIDE = 64
"""Side of a patch in model pixels, as in both shipped models."""

STRIDE = 8
"""Model pixels per cell of the feature map."""


@dataclass(frozen=True)
class PoolSource:
    """A data set."""

    folder: str
    every: int = 1
    """Take every n-th image."""


SOURCES = {
    "glas": PoolSource("glas"),
    "ebhi-seg": PoolSource("ebhi-seg", every=8),
    "kather-2016": PoolSource("kather2016"),
}

COMPOSED = 6
"""Images that are composed of each slide of kather-2016."""


@dataclass(frozen=True)
class Pool:
    """All patches of a data set, and the images that they are cut from."""

    names: tuple[str, ...]
    """Of the classes."""
    features_NF: NDArray[np.float32]
    present_NK: NDArray[np.bool_]
    image_N: NDArray[np.int64]
    """Image of each patch."""
    group_I: NDArray[np.str_]
    """Patient, case or slide of each image."""
    maps: tuple[NDArray[np.float16], ...]
    """Feature map (F, h, w) of each image."""
    truths: tuple[NDArray[np.uint8], ...]
    """Class of each pixel (H, W) of each image, or `IGNORED`."""


def load_pool(name: str, data: Path, output: Path, bundle: Bundle) -> Pool:
    """Return the patches of a data set with features of a bundle. They are computed once and kept in `output`."""
    file = output / f"{name}.npz"
    if not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / f".{name}.npz"
        # The stub of savez has `allow_pickle` as its only keyword.
        np.savez(temporary, **_computed(name, data, output, bundle))  # type: ignore[arg-type]
        temporary.rename(file)
    with np.load(file) as found:
        count = len(found["group_I"])
        return Pool(
            tuple(found["names"].tolist()),
            found["features_NF"],
            found["present_NK"],
            found["image_N"],
            found["group_I"],
            tuple(found[f"map-{i}"] for i in range(count)),
            tuple(found[f"truth-{i}"] for i in range(count)),
        )


def _computed(name: str, data: Path, output: Path, bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    source = SOURCES[name]
    dataset = load_dataset(name, data / source.folder)
    if dataset.card.attribution.split(",")[0] in bundle.card.training_data:
        raise SystemExit(f"{bundle.card.name} was trained on {name}; pass a bundle that was not (--model)")
    classifier = training_classifier(bundle)
    features: list[NDArray[np.float32]] = []
    present: list[NDArray[np.bool_]] = []
    image: list[int] = []
    groups: list[str] = []
    arrays: dict[str, NDArray[np.generic]] = {}
    for images in _images(dataset, source.every, output):
        for n, sample in enumerate(images.samples):
            rgb_HWC = images.rgb(n)
            with torch.inference_mode():
                deep_Fhw = classifier.stages(as_input(padded(rgb_HWC[None]), torch.device("cpu"), bundle.card)).deep[0]
            height, width = (-(-side // STRIDE) for side in rgb_HWC.shape[:2])
            map_Fhw = deep_Fhw[:, :height, :width].numpy()
            for box_4, present_K in zip(images.boxes[n], images.present[n], strict=True):
                if (box_4[:2] % SIDE == 0).all():  # the last row and column of crops overlap those before
                    features.append(box_mean(map_Fhw, box_4))
                    present.append(present_K)
                    image.append(len(groups))
            arrays |= {f"map-{len(groups)}": map_Fhw.astype(np.float16), f"truth-{len(groups)}": images.truth(n)}
            groups.append(sample.group)
        arrays["names"] = np.array(images.dataset.class_names)
    return arrays | {
        "features_NF": np.array(features, np.float32),
        "present_NK": np.array(present),
        "image_N": np.array(image),
        "group_I": np.array(groups),
    }


def box_mean(map_Fhw: NDArray[np.float32], box_4: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the mean of a feature map over a box (x, y, width, height) of model pixels, (F,)."""
    x, y, width, height = (box_4 // STRIDE).tolist()
    mean_F: NDArray[np.float32] = map_Fhw[:, y : y + height, x : x + width].mean(axis=(1, 2))
    return mean_F


def _images(dataset: Dataset, every: int, output: Path) -> Iterator[PatchImages]:
    """Yield the images of all splits of a data set, labeled patch by patch. kather-2016 is composed slide by slide."""
    rule = dataset.card.compose
    if rule is None:
        chosen = [sample for split in dataset.card.splits for sample in samples(dataset, split)]
        yield _labeled(dataset, chosen[::every])
        return
    few = Dataset(dataset.card.model_copy(update={"compose": rule.model_copy(update={"test": COMPOSED})}), dataset.root)
    for slide in SLIDES:
        mosaics = composed(fold(few, slide, images=1), output, ("test",))
        yield _labeled(mosaics, [replace(sample, group=slide) for sample in samples(mosaics, "test")])


def _labeled(dataset: Dataset, chosen: Sequence[Sample]) -> PatchImages:
    """Return images at about 1 µm per pixel, so that a patch is a whole number of image pixels wide."""
    side = round(SIDE / dataset.mpp)
    rule = dataset.card.labels
    assert isinstance(rule, CropLabels)
    card = dataset.card.model_copy(update={"labels": rule.model_copy(update={"side": side, "stride": side})})
    return PatchImages(Dataset(card, dataset.root), chosen, dataset.mpp * side / SIDE)
