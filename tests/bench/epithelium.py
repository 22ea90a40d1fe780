"""Epithelium against the rest on gland data sets, for docs/benchmarks/colorectal-tissue.md (other laboratories).

    python -m tests.bench.epithelium BUNDLE --dataset ebhi-seg --data FOLDER

The classes in `--epithelium` count as gland and all others as other, with and without the gate. A table has the
predicted classes of the pixels of each diagnosis, with the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import load_bundle
from models.predictor import Predictor
from pipeline.training.dataset import IGNORED, Dataset, Sample, load_dataset, read_mask, read_rgb, samples
from pipeline.training.evaluate import predict_image, scores
from pipeline.training.splits import rows_of

OTHER, GLAND = 0, 1

DIAGNOSIS = {"ebhi-seg": "gland_class", "glas": "grade"}
"""Column of the diagnosis of an image in the table of each data set."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--dataset", choices=sorted(DIAGNOSIS), default="ebhi-seg")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epithelium", nargs="+", default=["tumor", "mucosa"])
    parser.add_argument("--every", type=int, default=1, help="measure every n-th image")
    options = parser.parse_args(arguments)
    predictor = Predictor.from_bundle(load_bundle(options.bundle), device="cpu", output_stride=1)
    dataset = load_dataset(options.dataset, options.data)
    names = [entry.name for entry in predictor.card.classes]
    chosen = samples(dataset, "test")[:: options.every]
    assert dataset.card.table is not None
    rows = rows_of({sample.name: sample.image for sample in chosen}, dataset.root, dataset.card.table)
    for gate in (False, True):
        pixels: dict[str, NDArray[np.int64]] = {}
        for sample, counts_2P in zip(chosen, measure(predictor, dataset, chosen, gate=gate), strict=True):
            diagnosis = rows[sample.name][DIAGNOSIS[options.dataset]]
            pixels[diagnosis] = pixels.get(diagnosis, np.zeros_like(counts_2P)) + counts_2P
        all_2P = np.sum(list(pixels.values()), axis=0)
        found = scores(gland_confusion(all_2P, names, options.epithelium), dataset.class_names)
        iou = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.iou.items())
        print(f"gate {'on' if gate else 'off'}: mIoU {100 * found.miou:.1f} ({iou}), accuracy {found.accuracy:.3f}")
    print(table(pixels, dataset.class_names, names))


def measure(
    predictor: Predictor, dataset: Dataset, chosen: Sequence[Sample], *, gate: bool
) -> Iterator[NDArray[np.int64]]:
    """Yield an array (2, P) for each image: the number of pixels of each class of the mask and each predicted class.

    The last column counts the pixels that are predicted to have no class.
    """
    classes = len(predictor.card.classes)
    for sample in chosen:
        labels_HW = predict_image(predictor, read_rgb(sample), mpp=dataset.mpp, gate=gate)
        truth_HW = read_mask(dataset, sample)
        pairs_HW = truth_HW.astype(int) * (classes + 1) + np.minimum(labels_HW, classes)
        yield np.bincount(pairs_HW[truth_HW != IGNORED], minlength=2 * (classes + 1)).reshape(2, classes + 1)


def gland_confusion(counts_2P: NDArray[np.int64], names: Sequence[str], epithelium: Sequence[str]) -> NDArray[np.int64]:
    """Return the confusion matrix (3, 3) of other, gland and no class. No class counts as other."""
    matrix = np.zeros((3, 3), np.int64)
    for predicted, counts_2 in zip([*names, None], counts_2P.T, strict=True):
        matrix[:2, GLAND if predicted in epithelium else OTHER] += counts_2
    return matrix


def table(found: Mapping[str, NDArray[np.int64]], truths: Sequence[str], names: Sequence[str]) -> str:
    """Return the predicted classes of the pixels of each diagnosis and class of the mask, in percent, as Markdown."""
    columns = [*names, "no class"]
    lines = [f"| diagnosis | mask | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for diagnosis, counts_2P in sorted(found.items()):
        for truth, counts_P in zip(truths, counts_2P, strict=True):
            shares = " | ".join(f"{100 * share:.0f}" for share in counts_P / max(1, counts_P.sum()))
            lines.append(f"| {diagnosis} | {truth} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
