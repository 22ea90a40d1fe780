"""Measure what the mean of several segmenters gains, for docs/benchmarks/weak-supervision.md.

    python -m tests.bench.several_segmenters runs/ours-0 runs/ours-1 --data FOLDER --split val --tta

The arguments are runs of `tests.bench.weak_supervision`. Each pixel gets the class with the largest mean probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.bundle import load_bundle
from models.predictor import Canvases, Predictor
from pipeline.training.dataset import load_dataset
from pipeline.training.evaluate import evaluate
from tests.bench.patients import image_counts, interval, patient_counts


class MeanPredictor(Predictor):
    """A predictor that averages its own segmenter and those of `others`. The classifier and the gate are its own."""

    others: Sequence[Predictor] = ()

    def logits(self, rgb_NHWC: Canvases) -> Tensor:
        """Return the logarithm of the mean probabilities, (N, K, h, w)."""
        every = [super().logits(rgb_NHWC), *(one.logits(rgb_NHWC) for one in self.others)]
        return torch.stack([logits_NKhw.softmax(dim=1) for logits_NKhw in every]).mean(dim=0).log()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dataset", default="glas")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--tta", action="store_true", help="also measure the mean over the symmetries of a square")
    options = parser.parse_args(arguments)
    dataset = load_dataset(options.dataset, options.data)
    # Use OpenVINO if it is installed: with PyTorch, all symmetries of all images take an hour.
    first, *others = (
        MeanPredictor.from_bundle(load_bundle(run / "bundle"), device="cpu", runtime="auto", output_stride=1)
        for run in options.runs
    )
    first.others = others
    for flips in (False, True) if options.tta else (False,):
        found = evaluate(first, dataset, options.split, flips=flips)
        low, high = interval(np.stack(list(patient_counts(image_counts(found)).values()))[None])
        scores = found.scores("exclude")
        classes = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.iou.items())
        print(
            f"{options.split}{', symmetries' if flips else ''}: mIoU {100 * scores.miou:.2f} "
            f"({100 * low:.1f}–{100 * high:.1f}), {classes}, accuracy {100 * scores.accuracy:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
