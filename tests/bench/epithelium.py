"""Epithelium against the rest on gland data sets, for docs/benchmarks/colorectal-tissue.md (other laboratories).

    python -m tests.bench.epithelium BUNDLE --dataset ebhi-seg --data FOLDER

The classes in `--epithelium` count as gland and all others as other, with and without the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import load_bundle
from models.predictor import Predictor
from pipeline.training.dataset import Dataset, load_dataset, read_mask, read_rgb
from pipeline.training.evaluate import confusion_matrix, masked_samples, predict_image, scores

OTHER, GLAND = 0, 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--dataset", choices=("ebhi-seg", "glas"), default="ebhi-seg")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epithelium", nargs="+", default=["tumor", "mucosa"])
    parser.add_argument("--every", type=int, default=1, help="measure every n-th image")
    options = parser.parse_args(arguments)
    predictor = Predictor.from_bundle(load_bundle(options.bundle), device="cpu", output_stride=1)
    dataset = load_dataset(options.dataset, options.data)
    for gate in (True, False):
        matrix = measure(predictor, dataset, options.epithelium, options.every, gate=gate)
        found = scores(matrix, dataset.class_names)
        iou = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.iou.items())
        print(f"gate {'on' if gate else 'off'}: mIoU {100 * found.miou:.1f} ({iou}), accuracy {found.accuracy:.3f}")


def measure(
    predictor: Predictor, dataset: Dataset, epithelium: Sequence[str], every: int, *, gate: bool
) -> NDArray[np.int64]:
    """Return the pooled confusion matrix of every n-th test image. No class counts as other."""
    names = [entry.name for entry in predictor.card.classes]
    as_gland = np.array([GLAND if name in epithelium else OTHER for name in names] + [OTHER], np.uint8)
    matrix = np.zeros((3, 3), np.int64)
    for sample in masked_samples(dataset, "test")[::every]:
        labels_HW = predict_image(predictor, read_rgb(sample), mpp=dataset.mpp, gate=gate)
        matrix += confusion_matrix(read_mask(dataset, sample), as_gland[labels_HW], 2)
    return matrix


if __name__ == "__main__":
    main()
