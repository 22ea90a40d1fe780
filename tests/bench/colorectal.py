"""The tables of docs/benchmarks/colorectal-tissue.md: models measured on slides that they were not trained on.

    python -m tests.bench.colorectal --data FOLDER -o folds --slides 01 02 03 04 05 06 08
    python -m tests.bench.colorectal --data FOLDER --bundle colorectal-tissue      # tiles of the validation slide

Each fold leaves one slide out, validates on another and trains both networks on the rest. A classifier predicts the
class of a tile from the mean of its class map over the tile, so that its figures compare with those of a linear probe.
The map of both networks is measured on images composed of the left-out slide. Finished folds are not repeated, and a
folder holds the folds of one recipe.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.bundle import load_bundle, load_networks
from models.classifier import Classifier
from models.predictor import Predictor
from pipeline.training.calibration import reliability
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset, read_rgb, samples
from pipeline.training.dataset_sections import Split, TableSplit
from pipeline.training.evaluate import Scores, evaluate, scores
from pipeline.training.gate_calibration import calibrate_gate, patch_presence
from pipeline.training.inputs import as_input, padded
from pipeline.training.patches import PatchImages
from pipeline.training.presets import train_config
from pipeline.training.resample import resampled
from pipeline.training.train import train

RECALLS = (0.8, 0.85, 0.9, 0.95, 0.99)
CPU = torch.device("cpu")
IMAGES = 500
"""Composed training images of a fold."""
SLIDES = ("01", "02", "03", "04", "05", "06", "08")
VALIDATION = {"05": "06"}
"""Validation slide by left-out slide; 05 otherwise, because it has every tissue."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("folds"))
    parser.add_argument("--bundle", help="measure this bundle on the tiles of the validation split instead")
    parser.add_argument("--slides", nargs="+", choices=SLIDES, default=SLIDES)
    parser.add_argument("--dataset", choices=("kather-2016", "colorectal"), default="kather-2016")
    parser.add_argument("--images", type=int, default=IMAGES, help="composed training images of a fold")
    parser.add_argument("--set", nargs="*", default=[], help="settings, name=value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    dataset = load_dataset(options.dataset, options.data)
    if options.bundle is not None:
        bundle = load_bundle(options.bundle)
        classifier = load_networks(bundle)[0]
        assert isinstance(classifier, Classifier)
        scores_NK, labels_NK = tile_scores(classifier, dataset, bundle.card.mpp, "val")
        print(table_of({"validation": (scores_NK, labels_NK)}, dataset.class_names))
        return
    config = train_config("default", None, options.set, dataset.card.settings)
    _check_recipe(options.output, {"dataset": options.dataset, "images": options.images, "set": options.set})
    for slide in options.slides:
        run_fold(fold(dataset, slide, options.images), slide, options.output, config)
    print(table(options.output, dataset.class_names), gate_table(options.output), sep="\n\n")
    print(map_table(options.output, dataset.class_names))


def _check_recipe(output: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe into the folder, or raise SystemExit if its folds have another one: tables would mix the two."""
    file = output / "recipe.json"
    if not file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(recipe))
    elif (earlier := json.loads(file.read_text())) != recipe:
        raise SystemExit(f"{output} has folds of {earlier}, not of {dict(recipe)}; choose another folder")


def fold(dataset: Dataset, slide: str, images: int) -> Dataset:
    """Return the data set with one slide as its test split."""
    validation = VALIDATION.get(slide, "05")
    train = tuple(other for other in SLIDES if other not in (slide, validation))
    split = TableSplit(by="table", column="slide", train=train, val=(validation,), test=(slide,))
    assert dataset.card.compose is not None
    compose = dataset.card.compose.model_copy(update={"train": images, "val": 40})
    return Dataset(dataset.card.model_copy(update={"split": split, "compose": compose}), dataset.root)


def run_fold(dataset: Dataset, slide: str, output: Path, config: TrainConfig) -> None:
    """Train a fold and write its figures of the left-out slide, unless they are there.

    tiles.npz has the scores and labels of the tiles, presence.npz the presence in the gate windows of composed images
    of the validation and of the left-out slide, and maps.npz the confusion of the pixels, with and without the gate.
    """
    run = output / slide
    if (run / "maps.npz").is_file():
        return
    bundle = train(dataset, run, config, device="cpu")
    mosaics = composed(of_tiles_alone(dataset), run)
    classifier = load_networks(bundle)[0]
    assert isinstance(classifier, Classifier)
    scores_NK, labels_NK = tile_scores(classifier, dataset, mosaics.mpp)
    np.savez(run / "tiles.npz", allow_pickle=False, scores=scores_NK, labels=labels_NK)
    found: dict[str, NDArray[Any]] = {}
    splits: tuple[Split, ...] = ("val", "test")
    for split in splits:
        images = PatchImages(mosaics, samples(mosaics, split), mosaics.mpp)
        found[f"{split}_presence"], found[f"{split}_held"] = patch_presence(classifier, images, config, CPU)
    np.savez(run / "presence.npz", allow_pickle=False, **found)
    evaluation = evaluate(Predictor.from_bundle(bundle, device="cpu", output_stride=1), mosaics)
    matrices = {name: evaluation.matrices["exclude", gate] for name, gate in (("gated", True), ("ungated", False))}
    np.savez(run / "maps.npz", allow_pickle=False, **matrices)
    print(slide, json.dumps(tile_figures(scores_NK, labels_NK)), flush=True)


def of_tiles_alone(dataset: Dataset) -> Dataset:
    """Return the data set without the images of other laboratories, so that figures are of the left-out slide alone."""
    assert dataset.card.compose is not None
    compose = dataset.card.compose.model_copy(update={"cut": (), "whole": ()})
    return Dataset(dataset.card.model_copy(update={"compose": compose}), dataset.root)


def map_table(output: Path, names: Sequence[str]) -> str:
    """Return the scores of the maps of composed images: of each left-out slide, and of all their pixels.

    The mean of a slide is over the classes that it has.
    """
    folds = {file.parent.name: dict(np.load(file)) for file in sorted(output.glob("*/maps.npz"))}
    pooled = {name: np.sum([found[name] for found in folds.values()], axis=0) for name in ("gated", "ungated")}
    lines = [
        f"| slide | mean IoU | accuracy | mean IoU without the gate | {' | '.join(f'IoU {name}' for name in names)} |",
        "|---" * (len(names) + 4) + "|",
    ]
    means = []
    for slide, found in {**folds, "pooled": pooled}.items():
        gated, ungated = (_map_scores(found[name], names) for name in ("gated", "ungated"))
        iou = ["" if np.isnan(gated.iou[name]) else f"{gated.iou[name]:.3f}" for name in names]
        lines.append(f"| {slide} | {gated.miou:.3f} | {gated.accuracy:.3f} | {ungated.miou:.3f} | {' | '.join(iou)} |")
        means += [gated.miou] if slide in folds else []
    if len(means) > 1:
        lines.append(f"\nmean over the slides {np.mean(means):.3f}, standard deviation {np.std(means, ddof=1):.3f}")
    return "\n".join(lines)


def _map_scores(matrix: NDArray[np.int64], names: Sequence[str]) -> Scores:
    """Return the scores of a confusion of pixels; the IoU of a class that no pixel has is NaN."""
    found = scores(matrix, names)
    iou = {name: found.iou[name] if matrix[k].any() else np.nan for k, name in enumerate(names)}
    return replace(found, iou=iou, miou=float(np.nanmean(list(iou.values()))))


def gate_table(output: Path) -> str:
    """Return what thresholds that are calibrated on the validation slides do on the left-out slides, all pooled."""
    folds = [dict(np.load(file)) for file in sorted(output.glob("*/presence.npz"))]
    lines = [
        "| recall on the validation slide | recall on the left-out slide | absent classes closed | smallest recall |",
        "|---|---|---|---|",
    ]
    for wanted in RECALLS:
        held, passed, recalls = [], [], []
        for found in folds:
            thresholds_K = np.array(calibrate_gate(found["val_presence"], found["val_held"], wanted))
            known_K = found["val_held"].any(axis=0)  # of a class that validation lacks, the threshold is not calibrated
            passed.append((found["test_presence"] >= thresholds_K)[:, known_K].ravel())
            held.append(found["test_held"][:, known_K].ravel())
            recalls.append(passed[-1][held[-1]].mean())
        held_N, passed_N = np.concatenate(held), np.concatenate(passed)
        lines.append(
            f"| {wanted:g} | {passed_N[held_N].mean():.3f} | {(~passed_N)[~held_N].mean():.3f} | {min(recalls):.3f} |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def tile_scores(
    classifier: Classifier, dataset: Dataset, mpp: float, split: Split = "test"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the mean class probabilities (N, K) over each tile of a split, and the tiles' labels (N, K)."""
    scores, labels = [], []
    chosen = samples(dataset, split)
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        rgb_NHWC = np.stack([resampled(read_rgb(sample), dataset.mpp / mpp) for sample in part])
        x_NCHW = as_input(padded(rgb_NHWC), CPU, TrainConfig())
        map_NKhw = classifier.head_output(classifier.stages(x_NCHW), x_NCHW).map_NKhw.float()
        up_NKHW = F.interpolate(map_NKhw, size=x_NCHW.shape[2:], mode="bilinear", align_corners=False)
        height, width = rgb_NHWC.shape[1:3]
        scores.append(up_NKHW.softmax(dim=1)[:, :, :height, :width].mean(dim=(2, 3)).numpy())
        labels += [sample.labels_K for sample in part]
    return np.concatenate(scores), np.array(labels)


def tile_figures(scores_NK: NDArray[np.float32], labels_NK: NDArray[np.bool_]) -> dict[str, Any]:
    """Return accuracy, macro F1 and calibration error of tiles with one label, and the hits of tiles with several.

    A tile with several labels is hit if the most probable class is one of them.
    """
    single_N = labels_NK.sum(axis=1) == 1
    truth_N, predicted_N = labels_NK[single_N].argmax(axis=1), scores_NK[single_N].argmax(axis=1)
    # None for a class without a tile.
    f1 = [f1_score(truth_N == k, predicted_N == k) if (truth_N == k).any() else None for k in range(labels_NK.shape[1])]
    several = labels_NK[~single_N]
    hit_N = several[np.arange(len(several)), scores_NK[~single_N].argmax(axis=1)]
    calibration = reliability(torch.from_numpy(scores_NK[single_N]), torch.from_numpy(truth_N))
    return {
        "tiles": int(single_N.sum()),
        "accuracy": round(float((truth_N == predicted_N).mean()), 3),
        "macro_f1": round(float(np.mean([value for value in f1 if value is not None])), 3),
        "f1": [None if value is None else round(value, 2) for value in f1],
        "ece": round(calibration.error, 3),
        "several_hit": round(float(hit_N.mean()), 3) if len(several) else None,
    }


def f1_score(truth_N: NDArray[np.bool_], predicted_N: NDArray[np.bool_]) -> float:
    """Return the harmonic mean of precision and recall; 0 if nothing is true or predicted."""
    return float(2 * (truth_N & predicted_N).sum() / max(1, truth_N.sum() + predicted_N.sum()))


def table(output: Path, names: Sequence[str]) -> str:
    """Return `table_of` all folds in a folder."""
    folds = {}
    for file in sorted(output.glob("*/tiles.npz")):
        with np.load(file) as found:
            folds[file.parent.name] = found["scores"], found["labels"]
    return table_of(folds, names)


def table_of(folds: Mapping[str, tuple[NDArray[np.float32], NDArray[np.bool_]]], names: Sequence[str]) -> str:
    """Return the Markdown tables of the scores and labels of folds: each slide, all pooled, and the confusion."""
    rows = {slide: tile_figures(*fold) for slide, fold in folds.items()}
    scores_NK, labels_NK = (np.concatenate(parts) for parts in zip(*folds.values(), strict=True))
    rows["pooled"] = tile_figures(scores_NK, labels_NK)
    lines = ["| slide | tiles | accuracy | macro F1 | ECE | two labels, hit |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {slide} | {row['tiles']} | {row['accuracy']} | {row['macro_f1']} | {row['ece']} | {row['several_hit']} |"
        for slide, row in rows.items()
    ]
    single_N = labels_NK.sum(axis=1) == 1
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, (labels_NK[single_N].argmax(axis=1), scores_NK[single_N].argmax(axis=1)), 1)
    lines += ["", f"| truth | {' | '.join(names)} | F1 |", "|---" * (len(names) + 2) + "|"]
    lines += [
        f"| {name} | {' | '.join(map(str, row))} | {f1} |"
        for name, row, f1 in zip(names, matrix.tolist(), rows["pooled"]["f1"], strict=True)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
