"""What the gate costs and gains at several recalls, for docs/benchmarks/colorectal-tissue.md.

    python -m tests.bench.gate_recall BUNDLE --dataset kather-2016 --data FOLDER [--all]

The thresholds are calibrated on one half of the validation images and measured on the other half; with --all, both on
all of them. Both halves are of the same slides or patients.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.bundle import NO_DIGEST, Bundle, load_bundle, load_networks
from models.classifier import Classifier
from models.predictor import Predictor
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig, train_config
from pipeline.training.dataset import Dataset, Sample, load_dataset, samples
from pipeline.training.evaluate import confusion_matrix, scores
from pipeline.training.gate_calibration import calibrate_gate, patch_presence
from pipeline.training.inputs import surrounded
from pipeline.training.patches import PatchImages

CPU = torch.device("cpu")
RECALLS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
CORNER = (0, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--dataset", default="kather-2016")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(arguments)
    source = load_dataset(options.dataset, options.data)
    with tempfile.TemporaryDirectory() as work:
        dataset = composed(source, Path(work), ("val",))
        config = train_config("default", None, (), source.card.settings)
        chosen = samples(dataset, "val")
        parts = (chosen, chosen) if options.all else (chosen[::2], chosen[1::2])
        print(table(*calibrated(load_bundle(options.bundle), dataset, config, parts)))


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


@torch.inference_mode()
def table(gates: dict[str, Predictor], images: PatchImages) -> str:
    """Return a row for each gate. The networks run once per image."""
    one = next(iter(gates.values()))
    names = images.dataset.class_names
    matrices = {name: np.zeros((len(names) + 1,) * 2, np.int64) for name in gates}
    single, windows = dict.fromkeys(gates, 0), 0
    for index in range(len(images)):
        canvas = surrounded(images.rgb(index)[None], one.card.margin)
        truth_HW = images.truth(index)
        (presence_RCK,) = one.presence(canvas, [CORNER])
        logits_Khw = one.logits(canvas)[0]
        windows += presence_RCK[..., 0].numel()
        for name, gate in gates.items():
            labels_HW = labels(gate.gated(logits_Khw, presence_RCK, CORNER))[: truth_HW.shape[0], : truth_HW.shape[1]]
            matrices[name] += confusion_matrix(truth_HW, labels_HW, len(names))
            allowed_RC = (presence_RCK >= torch.tensor(gate.card.gate_thresholds)).sum(dim=2)
            single[name] += int((allowed_RC <= 1).sum())
    lines = ["| gate | mIoU | accuracy | windows with at most one class left | thresholds |", "|---|---|---|---|---|"]
    for name, matrix in matrices.items():
        found = scores(matrix, names)
        thresholds = ", ".join(f"{value:g}" for value in gates[name].card.gate_thresholds)
        share = single[name] / windows
        lines.append(f"| {name} | {found.miou:.3f} | {found.accuracy:.3f} | {share:.1%} | {thresholds} |")
    return "\n".join(lines)


def labels(probs_Khw: Tensor) -> np.ndarray:
    """Return the most probable class of each pixel, and K for a pixel without a class."""
    classes = len(probs_Khw)
    none_hw = probs_Khw.sum(dim=0) == 0
    return torch.where(none_hw, classes, probs_Khw.argmax(dim=0)).numpy().astype(np.uint8)


if __name__ == "__main__":
    main()
