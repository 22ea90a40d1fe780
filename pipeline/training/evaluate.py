"""Measures a predictor against the pixel masks of a data set: confusion matrices pooled over all images, and the scores
from them.

Images of any size become maps here as whole slides do in pipeline/slide/blocks.py: tiles at the model's resolution,
the gate per tile, and the weighted mean where tiles overlap. The truth is only counted against; no prediction sees it.

Shape suffixes: N tiles, K classes, H and W an image, h and w the map at the output stride, m at the model's resolution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from models.bundle import ModelCard
from models.errors import NonFiniteOutputError
from models.predictor import Predictor
from pipeline.errors import ClassMismatchError, MaskError, PipelineError
from pipeline.slide.blend import Blend, blend_tiles, winners
from pipeline.training.dataset import Dataset, Sample, background_HW, read_mask, read_rgb, samples
from pipeline.training.dataset_card import Split
from pipeline.training.resample import resampled
from wsi.box import Box
from wsi.windows import window_starts

OVERLAP = 0.5
"""Share of a tile that overlaps the next one."""

WHITE = "white"
"""Name of the class that protocol `include` adds."""

Protocol = Literal["exclude", "include"]
PROTOCOLS: tuple[Protocol, ...] = ("exclude", "include")


@dataclass(frozen=True)
class Scores:
    """Scores of one pooled confusion matrix; NaN where nothing can be said."""

    iou: dict[str, float]
    """Intersection over union per class, NaN for one that neither truth nor prediction holds."""
    miou: float
    """Mean of the IoUs that are not NaN."""
    fwiou: float
    """IoUs weighted by the classes' shares of the truth."""
    accuracy: float
    """Share of the counted pixels whose prediction is right."""


@dataclass(frozen=True)
class Evaluation:
    """What a predictor is worth on one split of a data set."""

    names: tuple[str, ...]
    """Of the classes, in the order of the matrices."""
    matrices: dict[tuple[Protocol, bool], NDArray[np.int64]]
    """By protocol, and whether the gate was on: pixels as `confusion_matrix` counts them, pooled over all images."""
    image_miou: dict[str, float]
    """By sample name: mean IoU of the image alone, protocol `exclude`, gate on; NaN where no pixel counts."""
    group_matrices: dict[str, NDArray[np.int64]]
    """By case, or by sample name where the data set names no cases: protocol `exclude`, gate on."""

    def miou_spread(self, draws: int = 1000) -> float:
        """Standard deviation of the mIoU (protocol `exclude`, gate on) over test sets of as many cases, drawn from
        these with replacement: what it would differ by on other cases of the same kind (Efron 1979). Deterministic.
        """
        matrices = np.stack(list(self.group_matrices.values()))
        rng = np.random.default_rng(0)
        drawn = (matrices[rng.integers(len(matrices), size=len(matrices))].sum(axis=0) for _ in range(draws))
        return float(np.nanstd([scores(matrix, self.names).miou for matrix in drawn]))

    def scores(self, protocol: Protocol = "exclude", *, gate: bool = True) -> Scores:
        """Scores of one of the matrices."""
        return scores(self.matrices[protocol, gate], self.names, protocol)


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    split: Split = "test",
    *,
    flips: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Predict every image of a split, with the gate and without it from one pass of the networks, and count.

    Protocol `exclude` drops pixels whose truth is white (no class of the data set's), and nothing of the prediction
    is background but what the gate leaves without a class, which is wrong. Protocol `include` counts white as one more
    class; predicted white is what the data set's background rule finds in the image, where it has one, and what is left
    without a class.

    Raises ClassMismatchError where the model's classes are not the data set's, DatasetError where the split has no
    images, an image of it no mask, or a file cannot be read: scores of a part of a test set compare with nothing.
    """
    check_classes(predictor.card, dataset)
    chosen = masked_samples(dataset, split)
    classes = len(dataset.class_names)
    size = classes + 1
    matrices = {(p, gate): np.zeros((size, size), np.int64) for p in PROTOCOLS for gate in (True, False)}
    image_miou: dict[str, float] = {}
    group_matrices: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros((size, size), np.int64))
    for done, sample in enumerate(chosen):
        progress(done, len(chosen))
        rgb_HWC, truth_HW = read_rgb(sample), read_mask(dataset, sample)
        white_HW = None if dataset.card.background is None else background_HW(rgb_HWC, dataset.card.background)
        for gate, labels_HW in zip((True, False), _labels(predictor, sample, rgb_HWC, dataset.mpp, flips), strict=True):
            plain = confusion_matrix(truth_HW, labels_HW, classes)
            matrices["exclude", gate] += plain
            matrices["include", gate] += (
                plain
                if white_HW is None
                else confusion_matrix(truth_HW, np.where(white_HW, np.uint8(classes), labels_HW), classes)
            )
            if gate:
                image_miou[sample.name] = scores(plain, dataset.class_names).miou
                group_matrices[sample.group or sample.name] += plain
    progress(len(chosen), len(chosen))
    return Evaluation(dataset.class_names, matrices, image_miou, dict(group_matrices))


def check_classes(model: ModelCard, dataset: Dataset) -> None:
    """Raise ClassMismatchError unless the model's classes are the data set's, by name and in the same order."""
    ours = tuple(entry.name for entry in model.classes)
    if ours != dataset.class_names:
        raise ClassMismatchError(
            f"model {model.name} has the classes {', '.join(ours)}; data set {dataset.card.name} has "
            f"{', '.join(dataset.class_names)}: evaluate with a model that was trained on these, in this order"
        )


def masked_samples(dataset: Dataset, split: Split) -> tuple[Sample, ...]:
    """Return the samples of a split, all of which have masks. Raises MaskError otherwise, and what `samples` raises."""
    chosen = samples(dataset, split)
    bare = [sample.name for sample in chosen if sample.mask is None]
    if bare:
        raise MaskError(
            f"{dataset.card.name}: {len(bare)} of {len(chosen)} images of split {split} have no mask (as {bare[0]}); "
            "evaluation needs pixel masks: choose a split that has them, or name them in the dataset.toml"
        )
    return chosen


def confusion_matrix(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Count pixels in a (K+1, K+1) matrix, rows truth, columns prediction; the last index of each collects what is no
    class.
    """
    rows = np.minimum(truth, classes).astype(np.int64)
    cells = rows * (classes + 1) + np.minimum(predicted, classes)
    return np.bincount(cells.ravel(), minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)


def scores(matrix: NDArray[np.int64], names: Sequence[str], protocol: Protocol = "exclude") -> Scores:
    """Return the scores of a pooled `confusion_matrix`: per class IoU = TP / (row + column - TP), their nanmean, their
    mean weighted by the classes' shares of the truth, and the pixel accuracy (Long et al., CVPR 2015, section 5).

    `exclude` drops the pixels whose truth is no class; a prediction of no class counts as wrong. `include` takes no
    class for a class of its own, named `WHITE`.
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
    """Return the class of each pixel of an image of `mpp` micrometres per pixel, (H, W) uint8; K for "no class".

    The image is averaged by area to the model's resolution (within `MPP_TOLERANCE` of it is left as it is) and cut into
    tiles that overlap by `OVERLAP`, the last ones flush with the edge; beyond an image smaller than a tile it is
    mirrored. Tiles are gated unless `gate` is False, and blended by the window of `Blend`. `flips` averages every tile
    over its eight flips and turns. Raises NonFiniteOutputError.
    """
    return _both_labels(predictor, rgb_HWC, mpp, flips)[0 if gate else 1]


def _labels(
    predictor: Predictor, sample: Sample, rgb_HWC: NDArray[np.uint8], mpp: float, flips: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        return _both_labels(predictor, rgb_HWC, mpp, flips)
    except NonFiniteOutputError as error:
        raise PipelineError(f"{sample.image}: {error}") from error


def _both_labels(
    predictor: Predictor, rgb_HWC: NDArray[np.uint8], mpp: float, flips: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Labels with the gate and without it."""
    rgb_m_HWC = resampled(rgb_HWC, mpp / predictor.card.mpp)
    sizes = predictor.output_stride, rgb_m_HWC.shape[:2], rgb_HWC.shape[:2]
    with predictor.lock, torch.inference_mode():
        gated, ungated = _blended(predictor, rgb_m_HWC, flips)
        return _own_labels(gated, *sizes), _own_labels(ungated, *sizes)


def _blended(predictor: Predictor, rgb_HWC: NDArray[np.uint8], flips: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (K, h, w) with the gate and without it, of an image at the model's resolution; the map covers the
    image and what had to be added to it to fill tiles and the map's pixels.
    """
    tile, stride, classes = predictor.card.tile_size, predictor.output_stride, len(predictor.card.classes)
    lengths = [max(tile, -(-length // stride) * stride) for length in rgb_HWC.shape[:2]]
    missing = [(0, length - had) for length, had in zip(lengths, rgb_HWC.shape[:2], strict=True)]
    # A copy in any case: torch takes no read-only arrays, such as Pillow's.
    padded_HWC = np.pad(rgb_HWC, [*missing, (0, 0)], mode="symmetric")
    columns, rows = (window_starts(length, tile, round(tile * (1 - OVERLAP))) for length in lengths[::-1])
    tiles = [Box(x, y, tile, tile) for y in rows for x in columns]
    canvas = Box(0, 0, lengths[1], lengths[0])
    gated, ungated = (Blend(canvas.reduce(stride), classes, tile // stride, predictor.device) for _ in range(2))

    def predict(rgb_NHWC: torch.Tensor, _tiles: Sequence[Box]) -> tuple[torch.Tensor, torch.Tensor]:
        return _tile_probabilities(predictor, rgb_NHWC, flips)

    blend_tiles((gated, ungated), predictor.on_device(padded_HWC), canvas, tiles, predict)
    return gated.mean(), ungated.mean()


def _tile_probabilities(predictor: Predictor, rgb_NHWC: torch.Tensor, flips: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (N, K, h, w) with the gate and without it. With flips the gate decides once, by mean presence."""
    views = list(_views(flips))
    # The transposition of a square is its quarter turn and a flip: with both, these are all its symmetries.
    turned = [(rgb_NHWC.flip(2) if flip else rgb_NHWC).rot90(turns, dims=(1, 2)).contiguous() for turns, flip in views]
    presence_NK = np.stack([predictor.presence(one) for one in turned]).mean(axis=0)
    gated = ungated = torch.zeros(())
    for (turns, flip), one in zip(views, turned, strict=True):
        logits_NKhw = predictor.logits(one).rot90(-turns, dims=(2, 3))
        logits_NKhw = logits_NKhw.flip(3) if flip else logits_NKhw
        gated = gated + predictor.gated(logits_NKhw, presence_NK) / len(views)
        ungated = ungated + logits_NKhw.softmax(dim=1) / len(views)
    return gated, ungated


def _views(flips: bool) -> Iterator[tuple[int, bool]]:
    """Quarter turns, and whether there is a left-right flip before them."""
    return ((turns, flip) for turns in range(4) for flip in (False, True)) if flips else iter([(0, False)])


def _own_labels(
    probs_Khw: torch.Tensor, stride: int, size_m: tuple[int, ...], size: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Labels of the image's own `size` (height, width) from the map, which begins with the image of `size_m`."""
    # The map may reach beyond the image by parts of its pixels: only at the model's resolution can that be cut off.
    probs_1KHW = F.interpolate(probs_Khw[None], scale_factor=float(stride), mode="bilinear", align_corners=False)
    probs_1KHW = probs_1KHW[:, :, : size_m[0], : size_m[1]]
    if size != size_m:
        probs_1KHW = F.interpolate(probs_1KHW, size=size, mode="bilinear", align_corners=False)
    return winners(probs_1KHW[0]).to(torch.uint8).cpu().numpy()
