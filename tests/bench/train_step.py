"""Times training steps of the classifier on a CPU, in turn with torch's gradients and those of models/depthwise.py.

python -m tests.bench.train_step glas --data FOLDER [--preset paper] [--set mpp=1.085] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.classifier import Classifier
from models.depthwise import speed_up_depthwise
from pipeline.training.classifier import classifier_task
from pipeline.training.dataset import load_dataset, samples
from pipeline.training.fit import Processes, Task, make_optimizer
from pipeline.training.patches import PatchImages
from pipeline.training.presets import train_config

IMAGES = 20
"""Images that batches are drawn from."""

STEPS = 6
"""Of each kind, after one that does not count."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print milliseconds per step, the median of a few."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_step")
    parser.add_argument("dataset")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", nargs="*", default=[], help="settings, name=value")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = train_config(options.preset, None, options.set)
    dataset = load_dataset(options.dataset, options.data)
    images = PatchImages(dataset, samples(dataset, "train")[:IMAGES], config.mpp or dataset.mpp)
    tasks: dict[str, Task] = {}
    for name in ("torch's", "ours"):
        torch.manual_seed(0)
        network = Classifier(config.backbone, config.head, len(dataset.class_names), config.depth)
        if name == "ours":
            speed_up_depthwise(network)
        tasks[name] = classifier_task(network, [images], images, config, torch.device("cpu"), Processes(0, 1))
        tasks[name].begin_epoch(1)
    optimizers = {name: make_optimizer(task, config) for name, task in tasks.items()}
    took: dict[str, list[float]] = {name: [] for name in tasks}
    rng = np.random.default_rng(0)
    for _ in range(STEPS + 1):
        batch = tasks["ours"].make_batch(rng)
        for name, task in tasks.items():
            begun = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            task.loss(batch).backward()
            optimizers[name].step()
            took[name].append(time.perf_counter() - begun)
    for name, seconds in took.items():
        print(f"gradients {name}: {1000 * statistics.median(seconds[1:]):.0f} ms per step")


if __name__ == "__main__":
    main()
