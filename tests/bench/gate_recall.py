"""What the gate costs and gains at several recalls, for docs/benchmarks/colorectal-tissue.md.

    python -m tests.bench.gate_recall BUNDLE --dataset kather-2016 --data FOLDER [--all]
    python -m tests.bench.gate_recall folds --folds --data FOLDER      # the folds of tests.bench.colorectal

The thresholds are calibrated on one half of the validation images and measured on the other half; with --all, both on
all of them. Both halves are of the same slides or patients.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import Bundle, load_bundle, load_networks
from models.card import NO_DIGEST
from models.classifier import Classifier
from models.predictor import Predictor
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, Sample, load_dataset, samples
from pipeline.training.evaluate import confusion_matrix, scores
from pipeline.training.gate_calibration import calibrate_gate, patch_presence
from pipeline.training.inputs import surrounded
from pipeline.training.patches import PatchImages
from pipeline.training.presets import train_config
from tests.bench.colorectal import IMAGES, fold

CPU = torch.device("cpu")
RECALLS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
CORNER = (0, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--dataset", default="kather-2016")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--folds", action="store_true", help="BUNDLE is the folder of tests.bench.colorectal")
    options = parser.parse_args(arguments)
    source = load_dataset(options.dataset, options.data)
    if options.folds:
        print(folds_table(Path(options.bundle), source))
        return
    with tempfile.TemporaryDirectory() as work:
        dataset = composed(source, Path(work), ("val",))
        config = train_config("default", None, (), source.card.settings)
        chosen = samples(dataset, "val")
        parts = (chosen, chosen) if options.all else (chosen[::2], chosen[1::2])
        print(table([measured(*calibrated(load_bundle(options.bundle), dataset, config, parts))], dataset.class_names))


def folds_table(folder: Path, dataset: Dataset) -> str:
    """Return `table` for the folds of tests.bench.colorectal, each calibrated on its validation slide."""
    found = []
    for run in sorted(folder.glob("*/bundle")):
        one = fold(dataset, run.parent.name, IMAGES)
        mosaics = composed(one, run.parent, ("val", "test"))
        config = train_config("default", None, (), dataset.card.settings)
        parts = samples(mosaics, "val"), samples(mosaics, "test")
        found.append(measured(*calibrated(load_bundle(run), mosaics, config, parts)))
    return table(found, dataset.class_names)


def calibrated(
    bundle: Bundle, dataset: Dataset, config: TrainConfig, parts: tuple[Sequence[Sample], Sequence[Sample]]
) -> tuple[dict[str, Predictor], PatchImages]:
    """Return predictors with gates calibrated on the first part of the images, and the second part."""
    networks = load_networks(bundle)
    assert isinstance(networks[0], Classifier)
    first, second = (PatchImages(dataset, part, bundle.card.mpp) for part in parts)
    presence_MK, held_MK = patch_presence(networks[0], first, config, CPU)
    thresholds = {"off": (0.0,) * len(dataset.class_names), "as shipped": bundle.card.gate_thresholds}
    thresholds |= {f"{recall:g}": calibrate_gate(presence_MK, held_MK, recall) for recall in RECALLS}
    gates = {
        name: Predictor.from_networks(
            bundle.card.model_copy(update={"gate_thresholds": values}), NO_DIGEST, *networks, device="cpu",
            output_stride=1,
        )
        for name, values in thresholds.items()
    }  # fmt: skip
    return gates, second


class Measured(NamedTuple):
    """What gates do on images."""

    matrices: dict[str, NDArray[np.int64]]
    """Pixel counts of each gate."""
    single: dict[str, int]
    """Windows with at most one class left."""
    windows: int
    thresholds: dict[str, str]


@torch.inference_mode()
def measured(gates: dict[str, Predictor], images: PatchImages) -> Measured:
    """Return what each gate does. The networks run once per image."""
    one = next(iter(gates.values()))
    classes = len(images.dataset.class_names)
    matrices = {name: np.zeros((classes + 1,) * 2, np.int64) for name in gates}
    single, windows = dict.fromkeys(gates, 0), 0
    for index in range(len(images)):
        canvas = surrounded(images.rgb(index)[None], one.card.margin)
        truth_HW = images.truth(index)
        (presence_RCK,) = one.presence(canvas, [CORNER])
        logits_Khw = one.logits(canvas)[0]
        windows += presence_RCK[..., 0].numel()
        for name, gate in gates.items():
            labels_HW = labels(gate.gated(logits_Khw, presence_RCK, CORNER))[: truth_HW.shape[0], : truth_HW.shape[1]]
            matrices[name] += confusion_matrix(truth_HW, labels_HW, classes)
            allowed_RC = (presence_RCK >= torch.tensor(gate.card.gate_thresholds)).sum(dim=2)
            single[name] += int((allowed_RC <= 1).sum())
    thresholds = {name: ", ".join(f"{value:g}" for value in gate.card.gate_thresholds) for name, gate in gates.items()}
    return Measured(matrices, single, windows, thresholds)


def table(parts: Sequence[Measured], names: Sequence[str]) -> str:
    """Return a row for each gate, pooled over the parts, with the thresholds of the first part."""
    lines = ["| gate | mIoU | accuracy | windows with at most one class left | thresholds |", "|---|---|---|---|---|"]
    windows = sum(part.windows for part in parts)
    for name, thresholds in parts[0].thresholds.items():
        found = scores(np.sum([part.matrices[name] for part in parts], axis=0), names)
        share = sum(part.single[name] for part in parts) / windows
        lines.append(f"| {name} | {found.miou:.3f} | {found.accuracy:.3f} | {share:.1%} | {thresholds} |")
    return "\n".join(lines)


def labels(probs_Khw: Tensor) -> np.ndarray:
    """Return the most probable class of each pixel, and K for a pixel without a class."""
    classes = len(probs_Khw)
    none_hw = probs_Khw.sum(dim=0) == 0
    return torch.where(none_hw, classes, probs_Khw.argmax(dim=0)).numpy().astype(np.uint8)


if __name__ == "__main__":
    main()
