"""Train the same recipe with several seeds, and report the mean and the spread of every score."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.bundle import Bundle
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset
from pipeline.training.train import train

SUMMARY = "seeds.json"
"""File with the scores of all seeds, in the folder that contains their runs."""


def train_seeds(
    dataset: Dataset, folder: Path, config: TrainConfig, seeds: Sequence[int], **options: Any
) -> dict[str, Any]:
    """Train with each seed in <folder>/seed-<seed>, write <folder>/seeds.json and return its content.

    Finished runs are not repeated. `options` are those of `train`, whose errors it raises.
    """
    bundles = {
        seed: train(dataset, folder / f"seed-{seed}", dataclasses.replace(config, seed=seed), **options)
        for seed in seeds
    }
    summary = summarized(bundles)
    if os.environ.get("RANK", "0") != "0":  # torchrun starts several processes
        return summary
    temporary = folder / f"{SUMMARY}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / SUMMARY)
    return summary


def summarized(bundles: dict[int, Bundle]) -> dict[str, Any]:
    """Return every score of the bundles: values, mean, and sample standard deviation, "spread".

    If the score of a seed is undefined, its value is None, and so are mean and spread.
    """
    metrics = [bundle.card.metrics for bundle in bundles.values()]
    names = dict.fromkeys(name for of_seed in metrics for name in of_seed)
    return {
        "bundles": {str(seed): str(bundle.path) for seed, bundle in bundles.items()},
        "metrics": {name: _summary([of_seed.get(name) for of_seed in metrics]) for name in names},
    }


def _summary(values: list[float | None]) -> dict[str, Any]:
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return {"mean": None, "spread": None, "values": values}
    mean, spread = statistics.fmean(defined), statistics.stdev(defined)
    return {"mean": round(mean, 4), "spread": round(spread, 4), "values": values}
