"""Train the segmenter of a run again, on pseudo masks of the training images made by that segmenter.

    python -m tests.bench.second_round rows/ours-0 --data FOLDER -o rows/ours-0-again

The run is one of the row `ours` of tests.bench.weak_supervision. The segmenter's maps are the mean over the eight
symmetries of a square. As in the first round, a pixel can only have a class that its labeled patches contain, and it is
ignored below the run's `confidence`, unless the labels allow only one class. The new segmenter starts as the first one
did. The true masks of the training and validation images are used only for measuring.

Shape suffixes: K classes, H and W an image.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from models.segmenter import NATIVE_STRIDE
from pipeline.training.augment import Move
from pipeline.training.config import TrainConfig, train_config
from pipeline.training.dataset import IGNORED, load_dataset
from pipeline.training.evaluate import confusion_matrix, scores
from pipeline.training.fit import fit, join_processes
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_masks import allowed_classes, mask_files, read_pseudo_masks
from pipeline.training.segmenter import segmenter_task, start_from_classifier, trusted_logits
from pipeline.training.train import prepare

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run of the row ours")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    if options.output.exists():
        raise SystemExit(f"{options.output} exists; choose a new folder, so that no product of another run is used")
    settings: dict[str, Any] = json.loads((options.run / "run.json").read_text())["config"]
    config = train_config("default", None, [], settings)
    dataset = load_dataset("glas", options.data)
    _, training, validation, classifier, segmenter = prepare(dataset, config)
    again = prepare(dataset, config).segmenter
    classifier.load_state_dict(safetensors.torch.load_file(options.run / "classifier.safetensors"))
    segmenter.load_state_dict(safetensors.torch.load_file(options.run / "segmenter.safetensors"))
    segmenter.eval()
    masks = options.output / "pseudo-masks"
    for index in range(len(training)):
        (file,) = mask_files(masks, training, index, config)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(second_mask(segmenter, training, index, config)).save(file)
    for name, folder in (("first", options.run / "pseudo-masks"), ("second", masks)):
        miou, ignored = measured(training, partial(stored_mask, folder, training, config))
        print(f"pseudo masks of the training images, {name} round: mIoU {miou:.4f}, ignored {ignored:.4f}", flush=True)
    print(f"validation images, first segmenter: mIoU {validation_miou(segmenter, validation, config):.4f}", flush=True)
    start_from_classifier(again, classifier)
    pseudo = partial(read_pseudo_masks, masks, training, config=config)
    processes = join_processes(CPU)
    fit(
        segmenter_task(again, training, validation, pseudo, config, CPU, processes),
        options.output,
        config,
        CPU,
        processes,
    )
    print(f"validation images, second segmenter: mIoU {validation_miou(again.eval(), validation, config):.4f}")


def stored_mask(folder: Path, images: PatchImages, config: TrainConfig, index: int) -> NDArray[np.uint8]:
    """Return the pseudo mask (H, W) of an image in a run folder."""
    (mask_HW,) = read_pseudo_masks(folder, images, index, config)
    return np.asarray(mask_HW)


def second_mask(segmenter: nn.Module, images: PatchImages, index: int, config: TrainConfig) -> NDArray[np.uint8]:
    """Return the pseudo mask (H, W) of an image from the segmenter's map; see `pseudo_masks_of_image`."""
    probs_KHW = mean_probabilities(segmenter, images.rgb(index), config)
    allowed_KHW = allowed_classes(
        images.boxes[index], images.present[index], probs_KHW.shape[1:], overlap=config.overlap_labels
    )
    probs_KHW[:, allowed_KHW.sum(axis=0) == 1] = 1.0
    kept_KHW = np.where(allowed_KHW, probs_KHW, 0)
    mask_HW = np.asarray(kept_KHW.argmax(axis=0), np.uint8)
    mask_HW[(kept_KHW.max(axis=0) < config.confidence) | ~allowed_KHW.any(axis=0)] = IGNORED
    return mask_HW


@torch.inference_mode()
def mean_probabilities(segmenter: nn.Module, rgb_HWC: NDArray[np.uint8], config: TrainConfig) -> NDArray[np.float32]:
    """Return the class probabilities (K, H, W) of an image, averaged over the eight symmetries of a square."""
    total_HWK: NDArray[Any] = np.zeros(())
    for move in (Move(turns, flip) for turns in range(4) for flip in (False, True)):
        moved_HWC = move.image(rgb_HWC)
        logits_1Khw = trusted_logits(segmenter, moved_HWC[None], config, CPU)
        up_1KHW = F.interpolate(logits_1Khw, scale_factor=NATIVE_STRIDE, mode="bilinear", align_corners=False)
        probs_KHW = up_1KHW[0, :, : moved_HWC.shape[0], : moved_HWC.shape[1]].softmax(dim=0)
        probs_HWK = probs_KHW.permute(1, 2, 0).numpy()
        total_HWK = total_HWK + np.rot90(probs_HWK[:, ::-1] if move.flip else probs_HWK, -move.turns)
    return np.asarray(total_HWK.transpose(2, 0, 1) / 8, np.float32)


def validation_miou(segmenter: nn.Module, images: PatchImages, config: TrainConfig) -> float:
    """Return the mean IoU of the segmenter's maps, all images pooled; no label restricts them."""
    return measured(images, lambda index: mean_probabilities(segmenter, images.rgb(index), config).argmax(axis=0))[0]


def measured(images: PatchImages, labels_of: Callable[[int], NDArray[np.integer[Any]]]) -> tuple[float, float]:
    """Return the mean IoU of label maps of all images, and the share of pixels that they ignore, which do not count."""
    names = images.dataset.class_names
    matrices = [
        confusion_matrix(images.truth(n), labels_of(n).astype(np.uint8), len(names)) for n in range(len(images))
    ]
    pooled_XX = np.sum(matrices, axis=0)
    ignored = float(pooled_XX[:-1, -1].sum() / pooled_XX[:-1].sum())
    pooled_XX[:, -1] = 0
    return scores(pooled_XX, names).miou, ignored


if __name__ == "__main__":
    main()
