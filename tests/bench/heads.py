"""Trains one classifier for each head under the same settings, for `python -m tests.bench.cams`.

    python -m tests.bench.heads --root FOLDER -o heads --set mpp=1.085 classifier_epochs=3

Leaves <head>.safetensors and the curves in the folder, and prints the options that `tests.bench.cams` takes.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import safetensors.torch
import torch

from models.heads import HEADS
from pipeline.training.classifier import build_classifier, classifier_task
from pipeline.training.dataset import check_images, load_dataset, samples
from pipeline.training.fit import Processes, fit, remove_checkpoint
from pipeline.training.patches import PatchImages
from pipeline.training.prepare import UNREADABLE_SHARE
from pipeline.training.presets import train_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="glas")
    parser.add_argument("--root", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--set", nargs="*", default=[], help="settings, name=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.output.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(options.data, options.root)
    for head in options.heads:
        file = options.output / f"{head}.safetensors"
        config = train_config("default", None, [*options.set, f"head={head}", "cam=grad-cam"])
        if not file.is_file():
            training, validation = (
                PatchImages(dataset, check_images(samples(dataset, split), UNREADABLE_SHARE), config.mpp or dataset.mpp)
                for split in ("train", "val")
            )
            torch.manual_seed(config.seed)
            classifier = build_classifier(config, len(dataset.class_names))
            device, alone = torch.device("cpu"), Processes(0, 1)
            folder = options.output / head
            folder.mkdir(exist_ok=True)
            task = classifier_task(classifier, [training], validation, config, device, alone)
            fit(task, folder, config, device, alone)
            safetensors.torch.save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, file)
            remove_checkpoint(folder, task.name)
        print(f"--classifier {head}={file}:{config.backbone}:{head}:{str(config.depth).lower()}", flush=True)


if __name__ == "__main__":
    main()
