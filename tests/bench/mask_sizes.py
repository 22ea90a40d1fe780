"""Measure the pseudo masks of a classifier at several pixel sizes, for docs/benchmarks/weak-supervision.md.

    python -m tests.bench.mask_sizes rows/ours-0 --data FOLDER --mpp 0.62 0.81 1.085      # a run with a classifier

The classifier of the run makes pseudo masks of the validation images at each pixel size. The figures are those of
`pseudo-masks.csv`: against the true masks, with ignored pixels left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.training.dataset import load_dataset, samples
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_scores import pseudo_scores
from tests.bench.sharper_masks import trained_classifier


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the masks and print a line for each pixel size and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dataset", default="glas")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mpp", type=float, nargs="+", required=True, help="pixel sizes in µm")
    options = parser.parse_args(arguments)
    dataset = load_dataset(options.dataset, options.data)
    classifier, config = trained_classifier(options.run, len(dataset.class_names))
    for mpp in options.mpp:
        validation = PatchImages(dataset, samples(dataset, "val"), mpp)
        for row in pseudo_scores(classifier, validation, config, torch.device("cpu")):
            miou, ignored = float(row["miou"]), float(row["ignored"])
            print(f"{mpp:g} µm/px, {row['layer']}: mean IoU {miou:.1%}, {ignored:.1%} ignored", flush=True)


if __name__ == "__main__":
    main()
