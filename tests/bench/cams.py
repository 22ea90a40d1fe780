"""Measures all CAM methods on trained classifiers, on the same held-out crops, in one run.

    python -m tests.bench.cams --bundle RUN_OR_BUNDLE --data glas -o DIR
    python -m tests.bench.cams --classifier NAME=FILE.safetensors:BACKBONE:HEAD:DEPTH … --data glas --root DATA -o DIR

The first classifier named is the main one: methods that need no head of their own (CAM, Grad-CAM, Grad-CAM++,
Score-CAM) run on it; pcam, lfi-cam and abn run on the first classifier that has their head. Crops are those that the
data set's labels are of, drawn from a split with masks. Writes cams.md (the table), cams.json and cams.png.

Score-CAM passes each channel's mask through the network: a crop takes as many passes as the deep stage has channels
(1280 for EfficientNet-Lite0: two seconds for a crop of 112 px on one core, against 40 ms of Grad-CAM).

Shape suffixes: N crops, K classes, B pairs of a crop and a class present in it, H and W space.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.bundle import load_bundle
from models.cam import CAMS, cam_maps
from models.classifier import Classifier
from models.errors import CamUnavailableError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.evaluate import check_same_classes, confusion_matrix, scores
from pipeline.training.pseudo_masks import jointly_scaled
from tests.bench.cam_crops import Crop, batches, choose_examples, draw_crops
from tests.bench.cam_picture import write_picture
from tests.bench.cam_scores import (
    average_drop,
    deletion,
    glass_white,
    increase,
    insertion,
    masked_scores,
    pointing_energy,
    unit_maps,
)
from tests.bench.training_stride import training_classifier

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """A classifier under measurement, and the images it expects."""

    name: str
    head: str
    classifier: Classifier
    mean: Sequence[float]
    std: Sequence[float]
    mpp: float


@dataclass(frozen=True)
class Row:
    """What one method's maps are worth."""

    method: str
    head: str
    classifier: str
    miou: float
    """Of the classes' IoUs pooled over all crops: per crop absent classes 0, joint min-max, argmax."""
    average_drop: float
    increase: float
    insertion: float
    deletion: float
    energy: float
    ms: float
    """Per map of one class, in batches."""
    peak_mb: float
    """Tensor memory above what lived before, while the maps of all classes of one crop are made."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    steps: int
    chunk: int
    batch: int
    device: torch.device


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    dataset = load_dataset(options.data, options.root)
    device = torch.device(options.device)
    subjects = [bundled(path, dataset, device) for path in options.bundle]
    subjects += [
        stored(text, len(dataset.class_names), options.mpp or dataset.mpp, device) for text in options.classifier
    ]
    if not subjects:
        sys.exit("cams: name a classifier, with --bundle or --classifier")
    crops = draw_crops(dataset, options.split, options.crops, options.seed)
    logger.info("%d crops of %s, %s", len(crops), dataset.card.name, options.split)
    settings = Settings(options.steps, options.chunk, options.batch, device)
    rows, columns = [], {}
    examples = choose_examples(crops, options.examples)
    for method in options.methods:
        subject = subject_for(method, subjects)
        if subject is None:
            logger.info("%s: no classifier named has a head for it", method)
            continue
        started = time.perf_counter()
        rows.append(measure(method, subject, crops, dataset, settings))
        columns[f"{CAMS[method].title} ({subject.head})"] = [
            example_map(method, subject, crops[index], k, dataset.mpp, settings) for index, k in examples
        ]
        logger.info("%s on %s: %.0f s", method, subject.name, time.perf_counter() - started)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "data": dataset.card.name,
        "split": options.split,
        "crops": len(crops),
        "seed": options.seed,
        "steps": options.steps,
        "chunk": options.chunk,
        "device": device_name(device),
        "torch": torch.__version__,
    }
    document = {**facts, "rows": [vars(row) for row in rows]}
    (options.output / "cams.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (options.output / "cams.md").write_text(table(rows, facts), encoding="utf-8")
    write_picture(options.output / "cams.png", [(crops[index], k) for index, k in examples], columns, dataset)
    print(table(rows, facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cams", description="Measure CAM methods.")
    parser.add_argument("--bundle", action="append", default=[], help="bundle, its folder, or a run's (repeatable)")
    parser.add_argument(
        "--classifier",
        action="append",
        default=[],
        help="NAME=FILE:BACKBONE:HEAD:DEPTH, after the bundles",
    )
    parser.add_argument("--mpp", type=float, help="µm per pixel that --classifier expects (default: the data set's)")
    parser.add_argument("--data", required=True, help="name or toml file of a data set")
    parser.add_argument("--root", type=Path, help="the data set's folder; the toml names the default")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=list(CAMS), choices=list(CAMS))
    parser.add_argument("--steps", type=int, default=20, help="of insertion and deletion")
    parser.add_argument("--chunk", type=int, default=32, help="images in the network at once")
    parser.add_argument("--batch", type=int, default=8, help="crops per call")
    parser.add_argument("--examples", type=int, default=6, help="rows of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def bundled(name: str, dataset: Dataset, device: torch.device) -> Subject:
    """Return the classifier of a bundle, or of the one in a training run's folder; its classes must be the data's."""
    inside = Path(name) / "bundle"
    bundle = load_bundle(inside if inside.is_dir() else name)
    check_same_classes(bundle.card, dataset)
    card, classifier = bundle.card, training_classifier(bundle)
    return Subject(card.name, card.classifier.head, classifier.to(device), card.mean, card.std, card.mpp)


def stored(text: str, classes: int, mpp: float, device: torch.device) -> Subject:
    """Return the classifier that NAME=FILE:BACKBONE:HEAD:DEPTH names (depth "none": the whole backbone), normalized as
    training does it.
    """
    import safetensors.torch

    name, _, rest = text.partition("=")
    file, backbone, head, depth = rest.rsplit(":", 3)
    classifier = Classifier(backbone, head, classes, None if depth == "none" else int(depth))
    weights = safetensors.torch.load_file(file)
    classifier.load_state_dict({key: t.float() if t.is_floating_point() else t for key, t in weights.items()})
    return Subject(name, head, classifier.eval().to(device), TrainConfig.mean, TrainConfig.std, mpp)


def subject_for(method: str, subjects: Sequence[Subject]) -> Subject | None:
    """Return the first classifier that has the method."""
    for subject in subjects:
        blank_1CHW = torch.zeros(1, 3, 64, 64, device=next(subject.classifier.parameters()).device)
        # Score-CAM exists for every head, and would take a pass per channel to say so.
        if method == "score-cam":
            return subject
        try:
            cam_maps(method, subject.classifier, blank_1CHW)
        except CamUnavailableError:
            continue
        return subject
    return None


def as_input(subject: Subject, crops: Sequence[Crop], mpp: float, device: torch.device) -> Tensor:
    """Return crops as the classifier's input (N, 3, H, W), at its µm per pixel, sides multiples of 8."""
    rgb_NHWC = torch.from_numpy(np.stack([crop.rgb_HWC for crop in crops])).to(device)
    x_NCHW = rgb_NHWC.permute(0, 3, 1, 2).float() / 255
    sides = [max(32, round(side * mpp / subject.mpp / 8) * 8) for side in x_NCHW.shape[2:]]
    if sides != list(x_NCHW.shape[2:]):
        x_NCHW = F.interpolate(x_NCHW, size=sides, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (subject.mean, subject.std))
    return (x_NCHW - mean) / std


def measure(method: str, subject: Subject, crops: Sequence[Crop], dataset: Dataset, settings: Settings) -> Row:
    """Return a method's row, over all crops."""
    classes = len(dataset.class_names)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("whole", "seen", "insertion", "deletion", "energy")}
    seconds = 0.0
    white_C = glass_white(subject.mean, subject.std).to(settings.device)
    first_1CHW = as_input(subject, crops[:1], dataset.mpp, settings.device)

    def maps_of(x_NCHW: Tensor) -> Tensor:
        return cam_maps(method, subject.classifier, x_NCHW, chunk=settings.chunk)

    def score(x_NCHW: Tensor) -> Tensor:
        probabilities: Tensor = subject.classifier(x_NCHW).sigmoid()
        return probabilities

    maps_of(first_1CHW)  # the first call of a size takes longer
    peak_mb = peak_bytes(lambda: maps_of(first_1CHW), settings.device) / 1e6
    for batch in batches(crops, settings.batch):
        x_NCHW = as_input(subject, batch, dataset.mpp, settings.device)
        _wait(settings.device)
        started = time.perf_counter()
        map_NKhw = maps_of(x_NCHW)
        _wait(settings.device)
        seconds += time.perf_counter() - started
        present_NK = torch.from_numpy(np.stack([crop.present_K for crop in batch])).to(settings.device)
        truth_NHW = np.stack([crop.truth_HW for crop in batch])
        matrix += confusion_matrix(truth_NHW, labels_of(map_NKhw, present_NK, truth_NHW.shape[1:]), classes)
        image_B, class_B = present_NK.nonzero(as_tuple=True)
        x_BCHW = x_NCHW[image_B]
        size_HW = (x_NCHW.shape[2], x_NCHW.shape[3])
        unit_BHW = explained(method, map_NKhw, size_HW)[image_B, class_B]
        order_BHW = F.interpolate(map_NKhw, size=size_HW, mode="bilinear", align_corners=False)[image_B, class_B]
        whole_B, seen_B = masked_scores(score, x_BCHW, unit_BHW, class_B, white_C, chunk=settings.chunk)
        kept["whole"].append(whole_B)
        kept["seen"].append(seen_B)
        for name, function in (("insertion", insertion), ("deletion", deletion)):
            kept[name].append(
                function(score, x_BCHW, order_BHW, class_B, white_C, steps=settings.steps, chunk=settings.chunk)
            )
        kept["energy"].append(energy_of(method, map_NKhw, truth_NHW, image_B, class_B, classes))
    whole_B, seen_B, insertion_B, deletion_B, energy_B = (torch.cat(values) for values in kept.values())
    return Row(
        method=method,
        head=subject.head,
        classifier=subject.name,
        miou=scores(matrix, dataset.class_names).miou,
        average_drop=average_drop(whole_B, seen_B),
        increase=increase(whole_B, seen_B),
        insertion=float(insertion_B.mean()),
        deletion=float(deletion_B.mean()),
        energy=float(energy_B.mean()),
        ms=1000 * seconds / (len(crops) * classes),
        peak_mb=peak_mb,
    )


def labels_of(map_NKhw: Tensor, present_NK: Tensor, size_HW: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the class of each pixel: joint min-max of a crop, absent classes out, argmax."""
    scaled_NKHW = jointly_scaled(map_NKhw, size_HW)
    labels_NHW: NDArray[np.uint8] = (
        scaled_NKHW.masked_fill(~present_NK[:, :, None, None], -1.0).argmax(dim=1).to(torch.uint8).cpu().numpy()
    )
    return labels_NHW


def explained(method: str, map_NKhw: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Return maps as each method's definition shows them, 0–1: with a ReLU, but for CAM, which has none."""
    return unit_maps(map_NKhw if method == "cam" else map_NKhw.relu(), size_HW)


def energy_of(
    method: str, map_NKhw: Tensor, truth_NHW: NDArray[np.uint8], image_B: Tensor, class_B: Tensor, classes: int
) -> Tensor:
    """Return `pointing_energy` at the masks' resolution; pixels without a class do not count."""
    truth_BHW = torch.from_numpy(truth_NHW).to(map_NKhw.device)[image_B]
    unit_BHW = explained(method, map_NKhw, (truth_NHW.shape[1], truth_NHW.shape[2]))[image_B, class_B]
    return pointing_energy(unit_BHW * (truth_BHW < classes), truth_BHW == class_B[:, None, None])


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes of tensors, above what lived before, while the work is done.

    Counted by torch's allocators (its profiler's memory events on the CPU): tracemalloc does not see tensors, and the
    resident size depends on what the C library keeps. Memory that a library takes for itself is not in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    # Any: the profiler's own record has no types. Frees are events of negative size.
    events: Any = recorded.profiler.kineto_results.events()
    changes: list[tuple[int, int]] = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what ran the networks, for the reader of a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def example_map(
    method: str, subject: Subject, crop: Crop, k: int, mpp: float, settings: Settings
) -> NDArray[np.float32]:
    """Return the map of a class, 0–1, at the crop's size."""
    x_1CHW = as_input(subject, [crop], mpp, settings.device)
    map_1Khw = cam_maps(method, subject.classifier, x_1CHW, chunk=settings.chunk)
    unit_HW: NDArray[np.float32] = (
        explained(method, map_1Khw, (crop.truth_HW.shape[0], crop.truth_HW.shape[1]))[0, k].cpu().numpy()
    )
    return unit_HW


def table(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, with what the columns mean."""
    lines = [
        f"{facts['crops']} crops of {facts['data']} ({facts['split']}, seed {facts['seed']}); {facts['device']}, torch "
        f"{facts['torch']}; chunk {facts['chunk']}, {facts['steps']} steps. mIoU: absent classes 0, joint min-max, "
        "argmax, against the pixel truth. The scores after it are means over pairs of a crop and a class in it, on "
        "sigmoid scores of the row's own classifier, against white glass; insertion starts from white. Maps as their "
        "definitions have them: CAM without ReLU, min-max per class. ms: per map of "
        "one class. Peak MB: of tensors, for all maps of one crop.",
        "",
        "| map (head) | classifier | mIoU % ↑ | average drop % ↓ | increase % ↑ | insertion ↑ | deletion ↓ | energy ↑ "
        "| ms | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {CAMS[row.method].title} ({row.head} head) | {row.classifier} | {100 * row.miou:.2f} "
        f"| {100 * row.average_drop:.1f} | {100 * row.increase:.1f} | {row.insertion:.3f} | {row.deletion:.3f} "
        f"| {row.energy:.3f} | {row.ms:.1f} | {row.peak_mb:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
