"""A linear probe on frozen ImageNet features, measured on left-out slides: the baseline of colorectal-tissue.md.

    python -m tests.bench.linear_probe --data FOLDER --copies 0 3

Each tile of kather-2016 becomes the mean and standard deviation of its feature map (EfficientNet-Lite0). A logistic
regression learns the tiles of all slides but one and predicts those of that one. With `--copies`, it also learns
copies of each training tile in other stains and as from other scanners. No image is composed and no layer is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.backbone import Backbone
from pipeline.training.augment import rescanned, restain
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, Sample, load_dataset, read_rgb, samples
from pipeline.training.inputs import as_input, load_start, padded
from pipeline.training.resample import resampled
from tests.bench.colorectal import table_of

BATCH = 64
STRENGTH = 0.3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mpp", type=float, default=1.0)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--depth", type=int, default=4, help="feature stages of the backbone")
    parser.add_argument("--copies", type=int, nargs="+", default=[0], help="augmented copies of each training tile")
    parser.add_argument("--penalty", type=float, default=1e-3, help="factor on the squared weights")
    options = parser.parse_args(arguments)
    dataset = load_dataset("kather-2016", options.data)
    chosen = [sample for split in dataset.card.splits for sample in samples(dataset, split)]
    backbone = Backbone(options.backbone, depth=options.depth)
    load_start(backbone.net, "imagenet", options.backbone)
    labels_NK = np.array([sample.labels_K for sample in chosen])
    slides_N = np.array([sample.group for sample in chosen])
    passes = [features(backbone.eval(), dataset, chosen, options.mpp, copy) for copy in range(max(options.copies) + 1)]
    for copies in options.copies:
        scores_NK = left_out_scores(passes[: copies + 1], labels_NK, slides_N, options.penalty)
        folds = {
            str(slide): (scores_NK[slides_N == slide], labels_NK[slides_N == slide]) for slide in np.unique(slides_N)
        }
        print(f"\n{copies} augmented copies\n\n{table_of(folds, dataset.class_names)}", flush=True)


@torch.inference_mode()
def features(backbone: Backbone, dataset: Dataset, chosen: Sequence[Sample], mpp: float, copy: int) -> Tensor:
    """Return the features (N, 2 C) of all tiles; copy 0 is the tiles themselves, and others are augmented."""
    found = []
    for start in range(0, len(chosen), BATCH):
        part = range(start, min(start + BATCH, len(chosen)))
        tiles = [resampled(read_rgb(chosen[n]), dataset.mpp / mpp) for n in part]
        if copy:
            tiles = [_augmented(tile, np.random.default_rng([copy, n])) for tile, n in zip(tiles, part, strict=True)]
        rgb_NHWC = np.stack(tiles)
        x_NCHW = as_input(padded(rgb_NHWC), torch.device("cpu"), TrainConfig())
        deep_NChw = backbone(x_NCHW).deep
        cells = round(rgb_NHWC.shape[1] * deep_NChw.shape[2] / x_NCHW.shape[2])
        deep_NChw = deep_NChw[:, :, :cells, :cells]
        found.append(torch.cat([deep_NChw.mean(dim=(2, 3)), deep_NChw.std(dim=(2, 3))], dim=1))
    return torch.cat(found)


def _augmented(rgb_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return rescanned(restain(rgb_HWC, STRENGTH, rng), STRENGTH, rng)


def left_out_scores(
    passes: Sequence[Tensor], labels_NK: NDArray[np.bool_], slides_N: NDArray[np.str_], penalty: float
) -> NDArray[np.float32]:
    """Return the class probabilities (N, K) of each tile by a regression that did not see its slide."""
    scores_NK = np.zeros(labels_NK.shape, np.float32)
    target_NK = torch.from_numpy(labels_NK / labels_NK.sum(axis=1, keepdims=True)).float()
    for slide in np.unique(slides_N):
        inside = torch.from_numpy(slides_N != slide)
        known = torch.cat([one[inside] for one in passes])
        mean, std = known.mean(dim=0), known.std(dim=0) + 1e-6
        weight, bias = fitted((known - mean) / std, target_NK[inside].repeat(len(passes), 1), penalty)
        scores_NK[slides_N == slide] = (((passes[0][~inside] - mean) / std) @ weight + bias).softmax(dim=1).numpy()
    return scores_NK


def fitted(x_NC: Tensor, target_NK: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weights (C, K) and biases (K,) of a softmax regression in which each class has the same total weight."""
    weight_N = (target_NK / target_NK.sum(dim=0)).nan_to_num().sum(dim=1)
    weight_N /= weight_N.sum()
    weight = torch.zeros(x_NC.shape[1], target_NK.shape[1], requires_grad=True)
    bias = torch.zeros(target_NK.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight_N * F.cross_entropy(x_NC @ weight + bias, target_NK, reduction="none")).sum()
        total: Tensor = loss + penalty * weight.square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    return weight.detach(), bias.detach()


if __name__ == "__main__":
    main()
