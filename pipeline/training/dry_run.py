"""What a training run would do: resolved settings, class counts, steps, time and memory, without training.

Shape suffixes: H and W an image.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.devices import compiles_sizes, native_convolutions
from pipeline.training.classifier import classifier_task, head_task
from pipeline.training.compose import composed, composed_name
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, check_images
from pipeline.training.dataset_sections import Split
from pipeline.training.familiarity import image_features, passes, recolored
from pipeline.training.fit import Processes, Task, time_steps, training_device
from pipeline.training.held_out import HELD_OUT, training_samples
from pipeline.training.inputs import as_input
from pipeline.training.patches import PatchImages
from pipeline.training.pieces import other_datasets
from pipeline.training.position import measures_position
from pipeline.training.prepare import UNREADABLE_SHARE, Parts, prepare
from pipeline.training.pseudo_masks import pseudo_masks_of_image
from pipeline.training.segmenter import segmenter_task
from pipeline.training.splits import hash_split

ALONE = Processes(0, 1)

COMPOSED = 12
"""Images of a split that are composed for a dry run, if the data set asks for composed images."""


def dry_run(
    dataset: Dataset, config: TrainConfig, device: str = "auto", init: Bundle | None = None, runs: int = 1
) -> dict[str, Any]:
    """Return the plan of one or several runs in plain values. Only temporary files are written.

    "minutes" is the time of all `runs`, one for each seed, including finished ones. "stages" and "memory_gb" are
    those of one run.

    All images are decoded and all labels are read, as for a run. Times come from a few steps of each network and one
    pseudo mask, and count every epoch, so a run that stops early is shorter. Of a data set with composed images, a few
    are composed, and the counts of patches do not contain the others. Raises the errors of `composed` and `prepare`.
    """
    place = training_device(device)
    with tempfile.TemporaryDirectory(prefix="wsi-train-") as work:
        splits: tuple[Split, ...] = tuple(split for split in dataset.card.splits if split != "test")
        parts = prepare(composed(_few(dataset), Path(work), splits), config, init)
        left_out = _left_out(dataset)
        counts = Counts(len(parts.training) + left_out.train, len(parts.validation) + left_out.val)
        pixels = parts.training.pixels()
        side = 0 if dataset.card.compose is None else round(dataset.card.compose.side * parts.training.scale)
        stages = _stages(parts, place, counts, pixels / (pixels + left_out.train * side**2))
        with native_convolutions(compiles_sizes(place, parts.classifier, parts.segmenter)):
            stages["finish"] = _finish(parts, place, counts, stages, other_datasets(dataset))
    return {
        "settings": dataclasses.asdict(parts.config),
        "device": place.type,
        "images": counts._asdict(),
        "patches": {"train": class_counts(parts.training), "val": class_counts(parts.validation)},
        "stages": stages,
        "runs": runs,
        "minutes": round(runs * sum(stage["minutes"] for stage in stages.values()), 1),
        "memory_gb": round(_peak_bytes(place) / 1e9, 2),
    }


def class_counts(images: PatchImages) -> dict[str, Any]:
    """Return the number of labeled patches, and of those that contain each class, as "patches" and "classes"."""
    present_BK = np.concatenate(images.present)
    names = images.dataset.class_names
    return {"patches": len(present_BK), "classes": dict(zip(names, present_BK.sum(axis=0).tolist(), strict=True))}


class Counts(NamedTuple):
    """The number of images of a run."""

    train: int
    val: int


def _few(dataset: Dataset) -> Dataset:
    """Return the data set with few composed images."""
    rule = dataset.card.compose
    if rule is None:
        return dataset
    few = rule.model_copy(update={name: min(COMPOSED, getattr(rule, name)) for name in ("train", "val", "test")})
    return Dataset(dataset.card.model_copy(update={"compose": few}), dataset.root)


def _left_out(dataset: Dataset) -> Counts:
    """Return how many of the composed images `_few` leaves out of what a run trains and validates on."""
    rule = dataset.card.compose
    if rule is None:
        return Counts(0, 0)
    if "val" in dataset.card.splits:
        return Counts(max(0, rule.train - COMPOSED), max(0, rule.val - COMPOSED))
    # As `training_samples` holds images out, by their names.
    names = [composed_name("train", n) for n in range(COMPOSED, rule.train)]
    held = sum(hash_split(name, 1 - HELD_OUT, HELD_OUT) == "val" for name in names)
    return Counts(len(names) - held, held)


def _stages(parts: Parts, device: torch.device, counts: Counts, share: float) -> dict[str, dict[str, Any]]:
    """Return the stages with their steps and minutes; `parts` has this share of the training pixels of the run."""
    config, training, by_size, validation, classifier, segmenter = parts
    one = PatchImages(validation.dataset, validation.samples[:1], training.dataset.mpp / validation.scale)
    held = counts.val
    classifier.to(device)
    task = classifier_task(classifier, by_size, one, config, device, ALONE)
    stages = {"classifier": _stage(task, config, device, config.classifier_steps, held, share)}

    classifier.eval()
    with native_convolutions(compiles_sizes(device, classifier)):
        seconds = _seconds(partial(pseudo_masks_of_image, classifier, training, 0, config, device))
    stages["pseudo masks"] = {"images": counts.train, "minutes": round(seconds * counts.train / 60, 2)}

    segmenter.to(device)
    task = segmenter_task(segmenter, training, one, _Stripes(training, config), config, device, ALONE, check=False)
    stages["segmenter"] = _stage(task, config, device, config.segmenter_steps, held, share)
    if config.head_epochs:
        classifier.layer_heads.clear()
        task = head_task(classifier, training, one, config, device, ALONE)
        stages["head"] = _stage(task, config, device, config.classifier_steps, held, share)
    return stages


def _stage(
    task: Task, config: TrainConfig, device: torch.device, asked_steps: int, held: float, share: float
) -> dict[str, Any]:
    step_seconds = time_steps(task, config, device)
    task.network.eval()
    with native_convolutions(compiles_sizes(device, task.network)):
        validation_seconds = _seconds(partial(task.validate, task.network)) * held
    steps = asked_steps or round(task.steps / share)
    return {
        "epochs": task.epochs,
        "steps_per_epoch": steps,
        "seconds_per_step": round(step_seconds, 3),
        "validation_seconds": round(validation_seconds, 1),
        "minutes": round(task.epochs * (steps * step_seconds + validation_seconds) / 60, 2),
    }


def _finish(
    parts: Parts, device: torch.device, counts: Counts, stages: Mapping[str, Any], others: Sequence[Dataset]
) -> dict[str, Any]:
    """Return the last stage, which calibrates and measures the networks; `stages` are the others."""
    config, classifier, segmenter = parts.config, parts.classifier.eval(), parts.segmenter.eval()
    views = config.position_views if measures_position(config) else 0
    view_seconds = 0.0
    if views:
        blank_NHWC = np.zeros((config.segmenter_batch, config.view, config.view, 3), np.uint8)

        @torch.inference_mode()
        def predict_views() -> None:
            segmenter(as_input(blank_NHWC, device, config)).softmax(dim=1).sum().item()

        view_seconds = _seconds(predict_views) / config.segmenter_batch
    assert config.mpp is not None
    read, familiarity_seconds = 0, 0.0
    for images, count in [(parts.training, counts), *(_first_image(other, config.mpp) for other in others)]:
        rgb_HWC = recolored(images.rgb(0), np.random.default_rng(0))
        each = _seconds(partial(image_features, classifier, rgb_HWC, config, device))
        read += passes(*count)
        familiarity_seconds += passes(*count) * each
    # The gate is calibrated with one pass of the classifier. Both networks also segment the images for the scores, and
    # with masks the segmenter once more for the temperature.
    of_classifier, of_segmenter = (stages[name]["validation_seconds"] for name in ("classifier", "segmenter"))
    masks = all(sample.mask is not None for sample in parts.validation.samples)
    validation_seconds = 2 * of_classifier + (2 if masks else 1) * of_segmenter
    seconds = views * view_seconds + familiarity_seconds + validation_seconds
    return {"views": views, "images": read, "minutes": round(seconds / 60, 2)}


def _first_image(dataset: Dataset, mpp: float) -> tuple[PatchImages, Counts]:
    """Return the first readable training image of a data set, and the number of its images."""
    training, validation = training_samples(dataset)
    # If none of these can be read, a run fails too.
    tried = training[: int(UNREADABLE_SHARE * len(training)) + 1]
    first = next((sample for sample in tried if check_images([sample], 1)), tried[0])
    return PatchImages(dataset, [first], mpp, cache_bytes=0), Counts(len(training), len(validation))


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call. The first call of a network takes longer, so the second one counts."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class _Stripes:
    """Pseudo masks of narrow stripes of all classes, because those of a run do not exist yet."""

    images: PatchImages
    config: TrainConfig

    def __call__(self, index: int) -> NDArray[np.uint8]:
        width, height = self.images.sizes_N2[index].tolist()
        layers = sum(weight > 0 for weight in self.config.layer_weights)
        columns_W = (np.arange(width) % len(self.images.dataset.class_names)).astype(np.uint8)
        return np.broadcast_to(columns_W, (layers, height, width))


def _peak_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
