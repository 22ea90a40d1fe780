"""What edge-aware steps and a second round of pseudo masks gain on GlaS, for docs/benchmarks/weak-supervision.md.

    python -m tests.bench.sharper_masks rows/ours-0 --data FOLDER      # a run of tests.bench.weak_supervision

All figures are mean IoUs against the true masks, with the pixels of all images of a split pooled. A step changes the
probabilities of the segmenter, or those of the classifier from which pseudo masks are made. A second round would train
a segmenter on the masks of the first one. No pixel is ignored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import scipy.ndimage
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.color import rgb2hed
from skimage.segmentation import slic
from torch import Tensor

from models.bundle import load_bundle, load_networks
from models.classifier import Classifier
from pipeline.training.classifier import build_classifier
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, Sample, labeled_boxes, load_dataset, read_mask, read_rgb, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.evaluate import confusion_matrix, scores
from pipeline.training.pseudo_masks import allowed_classes, class_probabilities
from pipeline.training.resample import resampled
from pipeline.training.segmenter import trusted_logits

GLAND = 1
CPU = torch.device("cpu")

Map = NDArray[np.floating]
"""Values of the pixels of an image, (H, W)."""

Step = Callable[[NDArray[np.uint8], Map], Map]
"""(rgb_HWC, probability of gland, (H, W)) -> the changed probability."""

SPLITS: tuple[Split, ...] = ("val", "train")


def gray(rgb_HWC: NDArray[np.uint8]) -> Map:
    """Return the mean of the channels."""
    return np.asarray(scipy.ndimage.gaussian_filter(rgb_HWC.astype(np.float32).mean(axis=2) / 255, 1))


def red(rgb_HWC: NDArray[np.uint8]) -> Map:
    """Return the smoothed red channel, in which hematoxylin is dark."""
    return np.asarray(scipy.ndimage.gaussian_filter(rgb_HWC[..., 0].astype(np.float32) / 255, 3))


def hematoxylin(sigma: float) -> Callable[[NDArray[np.uint8]], Map]:
    """Return a function to the smoothed density of hematoxylin, with a standard deviation of 0.2 before smoothing."""

    def of(rgb_HWC: NDArray[np.uint8]) -> Map:
        density_HW = rgb2hed(rgb_HWC)[..., 0].astype(np.float32)
        return np.asarray(scipy.ndimage.gaussian_filter((density_HW - density_HW.mean()) / density_HW.std() / 5, sigma))

    return of


def guided(guide: Callable[[NDArray[np.uint8]], Map], radius: int, strength: float) -> Step:
    """Return the guided filter of He et al. (TPAMI 2013) with a guide of one channel."""

    def mean(values_HW: Map) -> Map:
        return np.asarray(scipy.ndimage.uniform_filter(values_HW, 2 * radius + 1))

    def step(rgb_HWC: NDArray[np.uint8], probs_HW: Map) -> Map:
        guide_HW = guide(rgb_HWC)
        mean_HW, average_HW = mean(guide_HW), mean(probs_HW)
        slope_HW = (mean(guide_HW * probs_HW) - mean_HW * average_HW) / (
            mean(guide_HW * guide_HW) - mean_HW * mean_HW + strength
        )
        return mean(slope_HW) * guide_HW + mean(average_HW - slope_HW * mean_HW)

    return step


def superpixels(area_px: int, compactness: float) -> Step:
    """Return the mean over each SLIC superpixel of about this area."""

    def step(rgb_HWC: NDArray[np.uint8], probs_HW: Map) -> Map:
        count = probs_HW.size // area_px
        pieces_HW = slic(rgb_HWC, n_segments=count, compactness=compactness, sigma=1, start_label=0)
        mean_S = scipy.ndimage.mean(probs_HW, pieces_HW, range(int(pieces_HW.max()) + 1))
        found_HW: Map = np.asarray(mean_S)[pieces_HW]
        return found_HW

    return step


GUIDES = {"gray": gray, "red": red, "hematoxylin": hematoxylin(1), "smooth hematoxylin": hematoxylin(3)}
STEPS: dict[str, Step] = {
    "none": lambda _rgb_HWC, probs_HW: probs_HW,
    **{
        f"guided filter, {name}, {radius} px, {strength:g}": guided(guide, radius, strength)
        for name, guide in GUIDES.items()
        for radius in (8, 16)
        for strength in (1e-2, 1e-3)
    },
    **{
        f"superpixels of {area_px} px, compactness {compactness}": superpixels(area_px, compactness)
        for area_px in (150, 400, 1000)
        for compactness in (5, 15)
    },
}


def trained_classifier(run: Path, classes: int) -> tuple[Classifier, TrainConfig]:
    """Return the classifier of a training run as it makes pseudo masks, at stride 8, and the settings of the run."""
    stored = json.loads((run / "run.json").read_text())["config"]
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    config = TrainConfig(**values)
    classifier = build_classifier(config, classes)
    classifier.load_state_dict(safetensors.torch.load_file(run / "classifier.safetensors"))
    return classifier.eval(), config


class Run:
    """The networks of a finished training run, applied to whole images."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        bundle = load_bundle(folder / "bundle")
        self._temperature, self._segmenter = bundle.card.temperature, load_networks(bundle)[1]
        self._classifier, self._config = trained_classifier(folder, len(dataset.class_names))
        self._scale = dataset.mpp / bundle.card.mpp

    @torch.inference_mode()
    def probabilities(self, rgb_HWC: NDArray[np.uint8]) -> tuple[Map, Map]:
        """Return the probability of gland (H, W) by the segmenter and by the classifier's map."""
        small_HWC, size_HW = resampled(rgb_HWC, self._scale), rgb_HWC.shape[:2]
        logits_1Khw = trusted_logits(self._segmenter, small_HWC[None], self._config, CPU) / self._temperature
        up_1Khw = F.interpolate(logits_1Khw.softmax(dim=1), scale_factor=4.0, mode="bilinear", align_corners=False)
        segmenter_1Khw = up_1Khw[:, :, : small_HWC.shape[0], : small_HWC.shape[1]]
        classifier_1Khw = torch.from_numpy(class_probabilities(self._classifier, small_HWC, self._config, CPU))
        return gland(segmenter_1Khw, size_HW), gland(classifier_1Khw, size_HW)


def gland(probs_1Khw: Tensor, size_HW: Sequence[int]) -> Map:
    """Return the probability of gland at another size, (H, W)."""
    up_1KHW = F.interpolate(probs_1Khw, size=tuple(size_HW), mode="bilinear", align_corners=False)
    found_HW: Map = up_1KHW[0, GLAND].numpy()
    return found_HW


def allowed(dataset: Dataset, sample: Sample, probs_HW: Map) -> Map:
    """Return the probability with the labels of all patches obeyed, as pseudo masks obey them."""
    labeled = labeled_boxes(dataset, sample)
    allowed_KHW = allowed_classes(labeled.boxes_B4, labeled.present_BK, probs_HW.shape, overlap=True)
    certain_HW = allowed_KHW.sum(axis=0) == 1
    return np.where(certain_HW, allowed_KHW[GLAND], probs_HW).astype(np.float32)


def maps_of(dataset: Dataset, run: Run, sample: Sample, *, steps: bool) -> Iterator[tuple[str, Map]]:
    """Yield the name and the probability of gland of each way to make a mask of an image."""
    rgb_HWC = read_rgb(sample)
    segmenter_HW, classifier_HW = run.probabilities(rgb_HWC)
    if steps:
        for name, step in STEPS.items():
            yield f"step: {name}", step(rgb_HWC, segmenter_HW)
            if name != "none":
                yield (
                    f"masks of the classifier, with labels, step: {name}",
                    allowed(dataset, sample, step(rgb_HWC, classifier_HW)),
                )
    yield "masks of the classifier, with labels", allowed(dataset, sample, classifier_HW)
    yield "masks of the segmenter, with labels", allowed(dataset, sample, segmenter_HW)
    yield "masks of both, with labels", allowed(dataset, sample, (segmenter_HW + classifier_HW) / 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a run and print a line for each way to make masks. Steps are measured on the validation images only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args(arguments)
    dataset = load_dataset("glas", options.data)
    run = Run(options.run, dataset)
    for split in SPLITS:
        matrices: dict[str, NDArray[np.int64]] = {}
        for sample in samples(dataset, split):
            truth_HW = read_mask(dataset, sample)
            for name, probs_HW in maps_of(dataset, run, sample, steps=split == "val"):
                found = confusion_matrix(truth_HW, (probs_HW > 0.5).astype(np.uint8), 2)
                matrices[name] = matrices.get(name, np.zeros_like(found)) + found
        for name, matrix in matrices.items():
            print(f"{split}: {name}: {100 * scores(matrix, dataset.class_names).miou:.1f}")


if __name__ == "__main__":
    main()
