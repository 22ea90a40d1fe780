"""Whether adenoma becomes unfamiliar if the statistics leave it out, for docs/benchmarks/familiarity.md.

    python -m tests.bench.adenoma colorectal-tissue --data FOLDER      # FOLDER: ebhi-seg, glas, kather2016

The statistics of the model have two sources: composed images, and whole images of EBHI-Seg. They are fitted again with
other images of EBHI-Seg. The segmenter does not run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import load_bundle, load_networks
from models.classifier import Classifier
from models.familiarity import Statistics
from pipeline.training.compose import composed
from pipeline.training.dataset import Dataset, Sample, load_dataset, read_rgb, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.familiarity import SHARE_LIMIT, fit_familiarity
from pipeline.training.patches import PatchImages
from pipeline.training.prepare import training_images
from pipeline.training.resample import resampled
from pipeline.training.splits import rows_of
from tests.bench.familiarity import auroc, features

ADENOMA = ("low-grade-in", "serrated-adenoma")
OTHERS = ("adenocarcinoma", "high-grade-in", "normal", "polyp")
"""Kinds of images whose glands trained the networks."""

SOURCES: Mapping[str, Sequence[Sequence[str]]] = {
    "all of EBHI-Seg": [[*OTHERS, *ADENOMA]],
    "without adenoma": [OTHERS],
    "the same, with a Gaussian for each kind": [[kind] for kind in OTHERS],
}
"""The kinds of images of each Gaussian of EBHI-Seg."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args(arguments)
    bundle = load_bundle(options.model)
    classifier, mpp = load_networks(bundle)[0], bundle.card.mpp
    assert isinstance(classifier, Classifier)
    ebhi, glas = (load_dataset(name, options.data / name) for name in ("ebhi-seg", "glas"))
    kind_of = kinds(ebhi)

    def of(split: Split, wanted: Sequence[str]) -> list[Sample]:
        return [sample for sample in samples(ebhi, split) if kind_of[sample.name] in wanted]

    def features_of(dataset: Dataset, chosen: Sequence[Sample]) -> list[Tensor]:
        return [features(classifier, resampled(read_rgb(sample), dataset.mpp / mpp)) for sample in chosen]

    tested = {kind: features_of(ebhi, of("test", [kind])) for kind in (*ADENOMA, *OTHERS)}
    tested["GlaS"] = features_of(glas, [*samples(glas, "train"), *samples(glas, "val"), *samples(glas, "test")])
    print("| second source | low-grade neoplasia | serrated adenoma | other kinds | GlaS | AUROC of adenoma |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        mosaics = composed(load_dataset("colorectal", options.data / "kather2016"), Path(work), ("train", "val"))
        first = training_images(mosaics, mpp, cache_bytes=0)
        for name, gaussians in SOURCES.items():
            sources = [first]
            for wanted in gaussians:
                training, validation = (PatchImages(ebhi, of(split, wanted), mpp) for split in ("train", "val"))
                sources.append((training, validation))
            statistics, card = fit_familiarity(classifier, sources, bundle.card, "cpu")
            print(row(name, statistics, card.window_limit, tested), flush=True)


def kinds(dataset: Dataset) -> dict[str, str]:
    """Return the kind of each image of EBHI-Seg by its name."""
    assert dataset.card.table is not None
    every = [sample for split in dataset.card.splits for sample in samples(dataset, split)]
    rows = rows_of({sample.name: sample.image for sample in every}, dataset.root, dataset.card.table)
    return {name: found["gland_class"] for name, found in rows.items()}


def row(name: str, statistics: Statistics, limit: float, tested: Mapping[str, Sequence[Tensor]]) -> str:
    """Return the share of the images that are flagged, and the AUROC of adenoma against the other kinds."""

    def distances(*kinds: str) -> list[NDArray[np.floating]]:
        return [statistics.distances(one).numpy() / limit for kind in kinds for one in tested[kind]]

    groups = [distances(ADENOMA[0]), distances(ADENOMA[1]), distances(*OTHERS), distances("GlaS")]
    score = auroc(np.concatenate(distances(*OTHERS)), np.concatenate(distances(*ADENOMA)))
    return f"| {name} | {' | '.join(map(flagged, groups))} | {score:.2f} |"


def flagged(distances: Sequence[NDArray[np.floating]]) -> str:
    """Return the share of images that are flagged by `SHARE_LIMIT`, and the number of images."""
    share = np.mean([(one > 1).mean() > SHARE_LIMIT for one in distances])
    return f"{100 * share:.1f} % of {len(distances)}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
