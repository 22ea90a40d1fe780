"""Measure a predictor against a data set: its pixel masks, and the presence labels of its patches.

Images become maps like whole slides in pipeline/slide/blocks.py: canvases at the model's resolution, with gate windows.
Beyond their edges, images are mirrored. Predictions never depend on the truth.

Shape suffixes: R rows and C columns of gate windows, K classes, H and W an image, h and w the map at the output stride,
m at the model's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.canvas_pass import Corner
from models.card import ModelCard
from models.device_networks import SMALLEST_CORE
from models.errors import NonFiniteOutputError
from models.gate_windows import CELL, window_step
from models.predictor import Predictor
from pipeline.errors import ClassMismatchError, InferenceError, MaskError
from pipeline.slide.labels import winners
from pipeline.training.dataset import Dataset, Sample, background_HW, labeled_boxes, read_mask, read_rgb, samples
from pipeline.training.dataset_sections import WHITE, Split
from pipeline.training.labels import presence
from pipeline.training.patch_scores import PatchResults, smallest_share
from pipeline.training.resample import resampled
from wsi.box import Box

CORE_PX = 768
"""Largest side of a canvas's core, about that of a slide's canvases."""

Protocol = Literal["exclude", "include"]
PROTOCOLS: tuple[Protocol, ...] = ("exclude", "include")


@dataclass(frozen=True)
class Scores:
    """Scores of one pooled confusion matrix; NaN if a score is undefined."""

    iou: dict[str, float]
    """Intersection over union per class; NaN if neither truth nor prediction contains the class."""
    miou: float
    """Mean of the IoUs that are not NaN."""
    fwiou: float
    """Mean of the IoUs, weighted by the share of each class in the truth."""
    accuracy: float
    """Share of the counted pixels with a correct prediction."""


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating a predictor on one split of a data set."""

    names: tuple[str, ...]
    """Class names, in the order of the matrices."""
    matrices: dict[tuple[Protocol, bool], NDArray[np.int64]]
    """Pixel counts by protocol and gate (on or off), as in `confusion_matrix`, pooled over all images.

    Protocol `include` is missing if the data set has no background rule, because nothing would predict white. Empty if
    an image has no mask, because scores of a part of a split are not comparable.
    """
    image_matrices: dict[str, NDArray[np.int64]]
    """Matrix of each image by sample name; protocol `exclude`, gate on. Empty if an image has no mask."""
    groups: dict[str, str]
    """Case of each image, or its own name if the data set has no cases."""
    patches: PatchResults
    """Agreement with the presence labels."""

    @property
    def image_miou(self) -> dict[str, float]:
        """Return the mean IoU of each image; NaN if no pixel counts."""
        return {name: scores(matrix, self.names).miou for name, matrix in self.image_matrices.items()}

    @property
    def group_matrices(self) -> dict[str, NDArray[np.int64]]:
        """Return the matrix of each case."""
        size = len(self.names) + 1
        found = {group: np.zeros((size, size), np.int64) for group in self.groups.values()}
        for name, matrix in self.image_matrices.items():
            found[self.groups[name]] += matrix
        return found

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Return the protocols that were counted."""
        return tuple(dict.fromkeys(protocol for protocol, _ in self.matrices))

    def miou_spread(self, draws: int = 1000) -> float:
        """Return the bootstrap standard deviation of the mIoU over cases (Efron 1979), protocol `exclude`, gate on.

        Each draw takes as many cases with replacement. The result is deterministic; NaN if the pixels that count belong
        to fewer than two cases.
        """
        matrices = np.stack(list(self.group_matrices.values()))
        if matrices[:, :-1].any(axis=(1, 2)).sum() < 2:
            return math.nan
        rng = np.random.default_rng(0)
        drawn = (matrices[rng.integers(len(matrices), size=len(matrices))].sum(axis=0) for _ in range(draws))
        return float(np.nanstd([scores(matrix, self.names).miou for matrix in drawn]))

    def scores(self, protocol: Protocol = "exclude", *, gate: bool = True) -> Scores:
        """Return the scores of one of the matrices."""
        return scores(self.matrices[protocol, gate], self.names, protocol)


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    split: Split = "test",
    *,
    flips: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Predict every image of a split with and without the gate, and compare the maps with masks and presence labels.

    If every image has a mask, the pixels are counted against it. Protocol `exclude` drops pixels whose truth is white,
    that is, without a class. A prediction without a class, which only the gate produces, counts as wrong. Protocol
    `include` counts white as an additional class. A pixel is predicted white if it has no class, or if the data set's
    background rule matches it. A data set without such a rule has no protocol `include`.

    Raises ClassMismatchError if the model has other classes than the data set. Raises DatasetError if the split has no
    images, or a file cannot be read, because scores of a part of a test set are not comparable. Raises MaskError if no
    pixel of the masks has a class.
    """
    check_same_classes(predictor.card, dataset)
    found = evaluate_samples(predictor, dataset, samples(dataset, split), flips=flips, progress=progress)
    if found.matrices and not found.matrices["exclude", True][:-1].any():
        raise MaskError(
            f"{dataset.card.name}: no pixel of the masks of split {split} has a class; check mask_values and "
            "mask_excluded in the dataset.toml"
        )
    return found


def evaluate_samples(
    predictor: Predictor,
    dataset: Dataset,
    chosen: Sequence[Sample],
    *,
    flips: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Evaluate as `evaluate` does, on these samples of the data set.

    Raises MaskError and UnreadableImageError for a file that cannot be read.
    """
    counts = _PixelCounts(dataset) if all(sample.mask is not None for sample in chosen) else None
    minimum, classes = smallest_share(dataset.card, chosen), len(dataset.class_names)
    present: dict[str, NDArray[np.bool_]] = {}
    shown: dict[bool, dict[str, NDArray[np.bool_]]] = {True: {}, False: {}}
    for done, sample in enumerate(chosen):
        progress(done, len(chosen))
        rgb_HWC, labeled = read_rgb(sample), labeled_boxes(dataset, sample)
        present[sample.name] = labeled.present_BK
        of_gate = dict(zip((True, False), _labels(predictor, sample, rgb_HWC, dataset.mpp, flips), strict=True))
        for gate, labels_HW in of_gate.items():
            shown[gate][sample.name] = presence(labels_HW, labeled.boxes_B4, classes, minimum)
        if counts is not None:
            counts.add(sample, rgb_HWC, of_gate)
    progress(len(chosen), len(chosen))
    groups = {sample.name: sample.group or sample.name for sample in chosen}
    patches = PatchResults(dataset.class_names, minimum, present, shown, groups)
    matrices, image_matrices = ({}, {}) if counts is None else (counts.matrices, counts.image_matrices)
    return Evaluation(dataset.class_names, matrices, image_matrices, groups, patches)


class _PixelCounts:
    """The matrices of an `Evaluation` while images are added."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.rule, self.classes = dataset, dataset.card.background, len(dataset.class_names)
        protocols = PROTOCOLS if self.rule is not None else PROTOCOLS[:1]
        shape = (self.classes + 1,) * 2
        self.matrices = {(p, gate): np.zeros(shape, np.int64) for p in protocols for gate in (True, False)}
        self.image_matrices: dict[str, NDArray[np.int64]] = {}

    def add(self, sample: Sample, rgb_HWC: NDArray[np.uint8], of_gate: Mapping[bool, NDArray[np.uint8]]) -> None:
        """Count the predicted labels of an image, with the gate and without it, against its mask."""
        truth_HW = read_mask(self.dataset, sample)
        white_HW = None if self.rule is None else background_HW(rgb_HWC, self.rule)
        for gate, labels_HW in of_gate.items():
            plain = confusion_matrix(truth_HW, labels_HW, self.classes)
            self.matrices["exclude", gate] += plain
            if white_HW is not None:
                with_white_HW = np.where(white_HW, np.uint8(self.classes), labels_HW)
                self.matrices["include", gate] += confusion_matrix(truth_HW, with_white_HW, self.classes)
            if gate:
                self.image_matrices[sample.name] = plain


def check_same_classes(model: ModelCard, dataset: Dataset) -> None:
    """Raise ClassMismatchError unless model and data set have the same class names in the same order."""
    ours = tuple(entry.name for entry in model.classes)
    if ours != dataset.class_names:
        same = set(ours) == set(dataset.class_names)
        raise ClassMismatchError(
            f"model {model.name} has the classes {', '.join(ours)}; data set {dataset.card.name} has "
            f"{', '.join(dataset.class_names)}; "
            + (
                "list the classes in the dataset.toml in the order of the model"
                if same
                else "use a model that was trained with these classes"
            )
        )


def confusion_matrix(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Count pixels in a (K+1, K+1) matrix: rows are truth, columns are prediction, and index K is "no class"."""
    rows = np.minimum(truth, classes).astype(np.int64)
    cells = rows * (classes + 1) + np.minimum(predicted, classes)
    return np.bincount(cells.ravel(), minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def scores(matrix: NDArray[np.int64], names: Sequence[str], protocol: Protocol = "exclude") -> Scores:
    """Return the scores of a pooled `confusion_matrix` (Long et al., CVPR 2015, section 5).

    The IoU of a class is TP / (row + column - TP). `exclude` drops pixels without a class in the truth, and counts
    predictions without a class as wrong. `include` treats "no class" as a class named `WHITE`.
    """
    if matrix.shape != (len(names) + 1,) * 2:
        raise ValueError(f"matrix is {matrix.shape}; {len(names)} classes need {(len(names) + 1,) * 2}")
    if protocol == "include":
        names = (*names, WHITE)
    counted = matrix[: len(names)].astype(float)
    hit, truth, predicted = np.diag(counted), counted.sum(axis=1), counted.sum(axis=0)[: len(names)]
    union, total = truth + predicted - hit, counted.sum()
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    return Scores(
        iou={name: float(value) for name, value in zip(names, iou, strict=True)},
        miou=float(np.nanmean(iou)) if total else np.nan,
        fwiou=float(np.nansum(truth * iou) / total) if total else np.nan,
        accuracy=float(hit.sum() / total) if total else np.nan,
    )


def predict_image(
    predictor: Predictor, rgb_HWC: NDArray[np.uint8], *, mpp: float, gate: bool = True, flips: bool = False
) -> NDArray[np.uint8]:
    """Return the class of each pixel of an image of `mpp` micrometers per pixel, (H, W) uint8; K means "no class".

    The image is resampled to the model's resolution (see `resampled`) and cut into canvases, whose margins are mirrored
    at the edges of the image. The gate is not used if `gate` is False. `flips` averages every canvas over its eight
    flips and turns. Raises NonFiniteOutputError.
    """
    return _both_labels(predictor, rgb_HWC, mpp, flips)[0 if gate else 1]


def _labels(
    predictor: Predictor, sample: Sample, rgb_HWC: NDArray[np.uint8], mpp: float, flips: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        return _both_labels(predictor, rgb_HWC, mpp, flips)
    except NonFiniteOutputError as error:
        raise InferenceError(f"{sample.image}: {error}") from error


def _both_labels(
    predictor: Predictor, rgb_HWC: NDArray[np.uint8], mpp: float, flips: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the labels with the gate and without it."""
    rgb_m_HWC = resampled(rgb_HWC, mpp / predictor.card.mpp)
    sizes = predictor.output_stride, rgb_m_HWC.shape[:2], rgb_HWC.shape[:2]
    with predictor.lock, torch.inference_mode():
        gated, ungated = _probabilities(predictor, rgb_m_HWC, flips)
        return _own_labels(gated, *sizes), _own_labels(ungated, *sizes)


def _probabilities(predictor: Predictor, rgb_HWC: NDArray[np.uint8], flips: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities (K, h, w) of an image at the model's resolution, with the gate and without it.

    The map covers the image and its padding to whole cores.
    """
    card, stride = predictor.card, predictor.output_stride
    height, width = (-(-length // SMALLEST_CORE) * SMALLEST_CORE for length in rgb_HWC.shape[:2])
    beyond = [
        (card.margin, length - had + card.margin) for length, had in zip((height, width), rgb_HWC.shape, strict=False)
    ]
    # Always copy, because torch rejects read-only arrays such as those from Pillow.
    around = predictor.on_device(np.pad(rgb_HWC, [*beyond, (0, 0)], mode="symmetric"))
    maps = [torch.zeros((len(card.classes), height // stride, width // stride), device=predictor.device) for _ in "ab"]
    for y, x in product(range(0, height, CORE_PX), range(0, width, CORE_PX)):
        part = Box(x, y, min(CORE_PX, width - x), min(CORE_PX, height - y))
        rows, columns = slice(y, part.bottom + 2 * card.margin), slice(x, part.right + 2 * card.margin)
        found = _canvas_probabilities(predictor, around[None, rows, columns], flips)
        for map_Khw, probs_Khw in zip(maps, found, strict=True):
            map_Khw[:, y // stride : part.bottom // stride, x // stride : part.right // stride] = probs_Khw
    return maps[0], maps[1]


def _canvas_probabilities(
    predictor: Predictor, rgb_1HWC: torch.Tensor, flips: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities (K, h, w) of a core with and without the gate, which uses the mean over the flips."""
    views = list(_views(flips))
    # Quarter turns and one flip generate all eight symmetries of a square.
    turned = [_turned(rgb_1HWC[0], *view)[None].contiguous() for view in views]
    size = [side - 2 * predictor.card.margin for side in rgb_1HWC.shape[1:3]]
    corners = [_corner(predictor.card.gate_window, size, *view) for view in views]
    presences = [predictor.presence(one, [corner])[0] for one, corner in zip(turned, corners, strict=True)]
    presence_RCK = torch.stack([_back(one, *view) for one, view in zip(presences, views, strict=True)]).mean(dim=0)
    gated = ungated = torch.zeros(())
    for view, one in zip(views, turned, strict=True):
        logits_hwK = _back(predictor.logits(one)[0].permute(1, 2, 0), *view)
        logits_Khw = logits_hwK.permute(2, 0, 1)
        gated = gated + predictor.gated(logits_Khw, presence_RCK, corners[0]) / len(views)
        ungated = ungated + logits_Khw.softmax(dim=0) / len(views)
    return gated, ungated


def _turned(upright: torch.Tensor, turns: int, flip: bool) -> torch.Tensor:
    """Flip and turn a map with rows and columns as first axes."""
    return (upright.flip(1) if flip else upright).rot90(turns, dims=(0, 1))


def _corner(window: int, size: Sequence[int], turns: int, flip: bool) -> Corner:
    """Return a place for a turned core at which its gate windows are the turned windows of the upright core.

    `size` is the (height, width) of the upright core. At these places, `window_axis` repeats no window.
    """
    # The upper left quarter of the turned core has the number of its place in the upright one.
    mirrored = divmod(int(_turned(torch.arange(4).view(2, 2), turns, flip)[0, 0]), 2)
    y, x = (
        (CELL - length if back else window - CELL) % window_step(window)
        for length, back in zip(size, mirrored, strict=True)
    )
    return (y, x) if turns % 2 else (x, y)


def _back(turned: torch.Tensor, turns: int, flip: bool) -> torch.Tensor:
    """Undo the flip and the quarter turns of a map with rows and columns as first axes."""
    upright = turned.rot90(-turns, dims=(0, 1))
    return upright.flip(1) if flip else upright


def _views(flips: bool) -> Iterator[tuple[int, bool]]:
    """Return pairs of quarter turns and whether a left-right flip precedes them."""
    return ((turns, flip) for turns in range(4) for flip in (False, True)) if flips else iter([(0, False)])


def _own_labels(
    probs_Khw: torch.Tensor, stride: int, size_m: tuple[int, ...], size: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Return the labels at the image's own `size` (height, width) from a map that may extend beyond `size_m`."""
    # The map may extend beyond the image by a fraction of a map pixel, which only the model's resolution can crop.
    probs_1KHW = F.interpolate(probs_Khw[None], scale_factor=float(stride), mode="bilinear", align_corners=False)
    probs_1KHW = probs_1KHW[:, :, : size_m[0], : size_m[1]]
    if size != size_m:
        probs_1KHW = F.interpolate(probs_1KHW, size=size, mode="bilinear", align_corners=False)
    return winners(probs_1KHW[0]).to(torch.uint8).cpu().numpy()
