"""Third stage: train the segmenter from the pseudo masks of several layers.

Shape suffixes: N views, K classes, L layers, H and W the image, h and w a map at the output stride.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.cam import LAYERS
from models.classifier import Classifier
from models.segmenter import NATIVE_STRIDE, encoder_network
from pipeline.errors import TrainError
from pipeline.training.augment import Augmentation
from pipeline.training.classifier import held_out_batches, keep_statistics
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import IGNORED
from pipeline.training.fit import Processes, Task
from pipeline.training.inputs import as_input, load_start, surrounded
from pipeline.training.patch_scores import balanced_and_exact, drawn_scores, smallest_share
from pipeline.training.patches import PatchImages, draw_squares, make_labeled_view

logger = logging.getLogger(__name__)

SMALLEST_TAUGHT = 0.01
"""The stage fails if a smaller share of the pixels of a layer's pseudo masks has a class."""

SMALLEST_TAUGHT_CLASS = 1e-5
"""The stage fails if a class has a smaller share of the pixels of all pseudo masks."""


class SegmenterBatch(NamedTuple):
    """The views of one step, with their labels."""

    rgb_NHWC: NDArray[np.uint8]
    labels_NLHW: NDArray[np.uint8]


def segmenter_task(
    segmenter: nn.Module,
    training: PatchImages,
    validation: PatchImages,
    pseudo: Callable[[int], NDArray[np.uint8]],
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    *,
    check: bool = True,
) -> Task:
    """Return the training task of the segmenter on `pseudo`, the pseudo masks (L, H, W) of a training image by index.

    With `check`, raises TrainError if the pseudo masks teach nothing, or nothing about some class; see `check_taught`.
    """
    share = range(processes.rank, config.segmenter_batch, processes.world)
    augmentation = Augmentation(config.stain, config.imaging, config.blur, config.segmenter_moves)

    names = training.dataset.class_names
    counts_LX = pixel_counts(map(pseudo, range(len(training))), len(names))
    if check:
        check_taught(counts_LX, names, config)
    weight_K = pixel_weights(counts_LX[:, :-1].sum(axis=0), balance=config.balance).to(device)
    weights = tuple(weight for weight in config.layer_weights if weight > 0)

    def make_batch(rng: np.random.Generator) -> SegmenterBatch:
        count = config.segmenter_batch
        places = draw_squares(training, count, config.view, rng)
        seeds = rng.integers(2**32, size=count)
        views = [
            make_labeled_view(
                training, pseudo(places[n].image), places[n], augmentation, np.random.default_rng(seeds[n])
            )
            for n in share
        ]
        rgb_NHWC, labels_NLHW = (np.stack(part) for part in zip(*views, strict=True))
        labels_NLHW[~_trusted(labels_NLHW.shape, config.margin)] = IGNORED
        return SegmenterBatch(rgb_NHWC, labels_NLHW)

    def loss(batch: SegmenterBatch) -> Tensor:
        logits_NKhw = segmenter(as_input(batch.rgb_NHWC, device, config))
        return layered_loss(logits_NKhw, torch.from_numpy(batch.labels_NLHW).to(device), weights, weight_K)

    trusted_px = (config.view - 2 * config.margin) ** 2

    def begin_epoch(_epoch: int) -> None:
        segmenter.train()
        if config.keeps_backbone:
            encoder.eval()
        elif config.encoder_starts:
            keep_statistics(encoder)

    encoder: Any = segmenter.encoder
    if config.keeps_backbone:
        encoder.requires_grad_(False)
    elif config.encoder_starts:
        for name, parameter in encoder_network(segmenter).named_parameters():
            parameter.requires_grad_(not name.startswith(config.frozen))
    trained = config.encoder_pretrained or config.shared_backbone
    started = {id(parameter) for parameter in encoder.parameters()} if trained else set()
    return Task(
        name="segmenter",
        network=segmenter,
        new_parameters=[p for p in segmenter.parameters() if id(p) not in started],
        make_batch=make_batch,
        loss=loss,
        validate=lambda network: map_scores(network, validation, config, device),
        begin_epoch=begin_epoch,
        epochs=config.segmenter_epochs,
        steps=config.segmenter_steps or max(1, round(training.pixels() / (trusted_px * config.segmenter_batch))),
    )


def _trusted(shape: Sequence[int], margin: int) -> NDArray[np.bool_]:
    """Return which pixels of maps (..., H, W) have `margin` pixels of context on all sides."""
    inner = np.zeros(shape, dtype=bool)
    inner[..., margin : shape[-2] - margin, margin : shape[-1] - margin] = True
    return inner


def start_encoder(segmenter: nn.Module, config: TrainConfig) -> None:
    """Load the initial weights of the encoder, if it has any. Raises TrainError if they are missing or do not fit."""
    if config.encoder_pretrained:
        weights = config.weights if config.encoder_starts else config.encoder_weights
        load_start(encoder_network(segmenter), weights, config.encoder_name)


def start_from_classifier(segmenter: nn.Module, classifier: Classifier) -> None:
    """Copy the weights of the classifier's backbone into a timm encoder of the same, possibly truncated, network."""
    encoder: Any = segmenter.encoder
    own = encoder.model.state_dict()
    for name, tensor in classifier.backbone.net.state_dict().items():
        if name in own:  # the encoder has no layers after the last stage
            own[name].copy_(tensor)


def pixel_counts(pseudo: Iterable[NDArray[np.uint8]], classes: int) -> NDArray[np.int64]:
    """Return the number of pixels (L, K + 1) of each class in each layer of the pseudo masks (L, H, W) of all images.

    The last column counts the `IGNORED` pixels.
    """
    counts = [
        [np.bincount(np.minimum(labels_HW, classes).ravel(), minlength=classes + 1) for labels_HW in labels_LHW]
        for labels_LHW in pseudo
    ]
    counts_LX: NDArray[np.int64] = np.sum(counts, axis=0)
    return counts_LX


def check_taught(counts_LX: NDArray[np.int64], names: Sequence[str], config: TrainConfig) -> None:
    """Log the share of the pixels that teach each class in each layer, and raise TrainError if it is almost zero.

    `counts_LX` are `pixel_counts`. Without this check, a segmenter that is taught nothing would train with a loss of 0.
    """
    shares_LX = counts_LX / counts_LX.sum(axis=1, keepdims=True)
    layers = [layer for layer, weight in zip(LAYERS, config.layer_weights, strict=True) if weight > 0]
    advice = (
        "look at the pictures in the run's folder pseudo-masks; set a lower confidence, more classifier_epochs or "
        "other labels, or change [background] in the dataset.toml, and start in a new folder"
    )
    for layer, shares_X in zip(layers, shares_LX, strict=True):
        text = ", ".join(f"{name} {share:.2%}" for name, share in zip((*names, "ignored"), shares_X, strict=True))
        logger.info("pixels of the %s pseudo masks: %s", layer, text)
        if 1 - shares_X[-1] < SMALLEST_TAUGHT:
            raise TrainError(
                f"segmenter: the {layer} pseudo masks have a class in {1 - shares_X[-1]:.2%} of the pixels, but at "
                f"least {SMALLEST_TAUGHT:.0%} is needed ({text}); {advice}"
            )
    counts_X = counts_LX.sum(axis=0)
    untaught = [
        name for name, count in zip(names, counts_X, strict=False) if count < SMALLEST_TAUGHT_CLASS * counts_X.sum()
    ]
    if untaught:
        raise TrainError(
            f"segmenter: the pseudo masks have less than {SMALLEST_TAUGHT_CLASS:.3%} of their pixels in class "
            f"{', '.join(untaught)}, so the map would never show it; {advice}"
        )


def pixel_weights(counts_K: NDArray[np.int64], *, balance: bool) -> Tensor:
    """Return the weight (K,) of a pixel of each class: 1, or with `balance` the square root of its inverse share.

    The square root is used because full inverse shares make a rare class spill over its borders.
    """
    classes = len(counts_K)
    if not balance:
        return torch.ones(classes)
    shares_K = np.maximum(counts_K, 1) / max(1, int(np.sum(counts_K)))
    return torch.from_numpy(np.minimum(np.sqrt(1 / (classes * shares_K)), 10.0)).float()


def layered_loss(
    logits_NKhw: Tensor, labels_NLHW: Tensor, weights: tuple[float, ...], weight_K: Tensor | None = None
) -> Tensor:
    """Return the weighted sum over layers of the cross-entropy against each layer's pseudo mask (Han et al. 2022).

    `IGNORED` pixels have no effect. The masks are compared at the stride of the logits, at the pixel nearest to each
    cell's center. A layer without a labeled pixel adds 0.
    """
    stride = labels_NLHW.shape[2] // logits_NKhw.shape[2]
    small_NLhw = labels_NLHW[:, :, stride // 2 :: stride, stride // 2 :: stride].long()
    terms = []
    for layer, weight in enumerate(weights):
        target_Nhw = small_NLhw[:, layer]
        total = F.cross_entropy(logits_NKhw.float(), target_Nhw, weight_K, ignore_index=IGNORED, reduction="sum")
        each_K = torch.ones(logits_NKhw.shape[1], device=logits_NKhw.device) if weight_K is None else weight_K
        counted = each_K[target_Nhw[target_Nhw != IGNORED]].sum()
        terms.append(weight * total / counted.clamp_min(1e-6))
    return torch.stack(terms).sum()


@torch.inference_mode()
def map_scores(network: nn.Module, images: PatchImages, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Return how well the predicted map agrees with the presence labels of all labeled patches.

    Pixels of masks are never used. A class counts as found if it covers more than `smallest_share` of a patch.
    "balanced" and "exact" are those of `_balanced_and_exact`. "score" is their mean: few patches lack a class, so
    "balanced" alone jumps from epoch to epoch with a handful of patches, and "exact" alone ignores those patches.
    "score_error" is the standard error of "score", from a bootstrap over the images.
    """
    minimum = smallest_share(images.dataset.card, images.samples)
    found, present = [], []
    for rgb_NHWC, boxes, present_MK in held_out_batches(images, whole=config.region is not None):
        labels_Nhw = trusted_logits(network, rgb_NHWC, config, device).argmax(dim=1).cpu().numpy()
        for labels_hw, boxes_B4 in zip(labels_Nhw, boxes, strict=True):
            found += [_covered(labels_hw, box, images.present[0].shape[1]) > minimum for box in boxes_B4.tolist()]
        present.append(present_MK)
    found_MK, present_MK = np.stack(found), np.concatenate(present)
    balanced, exact = _balanced_and_exact(found_MK, present_MK)
    of_image = np.split(np.arange(len(found_MK)), images.ends_N[:-1])
    error = float(drawn_scores(_balanced_and_exact, found_MK, present_MK, of_image, 200).mean(axis=1).std())
    return {"score": (balanced + exact) / 2, "score_error": error, "balanced": balanced, "exact": exact}


def _balanced_and_exact(found_MK: NDArray[np.bool_], present_MK: NDArray[np.bool_]) -> tuple[float, float]:
    """Return `balanced` and `exact` of `PatchScores`.

    The choice of an epoch needs a number. If every class is in all patches or in none, `balanced` is therefore the
    share of right answers, one per patch and class.
    """
    balanced, exact = balanced_and_exact(found_MK, present_MK)
    return float((found_MK == present_MK).mean()) if math.isnan(balanced) else balanced, exact


def trusted_logits(
    network: nn.Module, rgb_NHWC: NDArray[np.uint8], config: TrainConfig, device: torch.device
) -> Tensor:
    """Return the logits (N, K, h, w) of images that are mirrored by `margin` pixels beyond their edges."""
    (height, width), margin = rgb_NHWC.shape[1:3], config.margin
    logits_NKhw: Tensor = network(as_input(surrounded(rgb_NHWC, margin), device, config)).float()
    rows, columns = (slice(margin // NATIVE_STRIDE, -(-(margin + side) // NATIVE_STRIDE)) for side in (height, width))
    return logits_NKhw[:, :, rows, columns]


def _covered(labels_hw: NDArray[np.int64], box: list[int], classes: int) -> NDArray[np.float64]:
    """Return the share of a box (x, y, width, height in image pixels) that each class covers."""
    x, y, width, height = (round(value / NATIVE_STRIDE) for value in box)
    part = labels_hw[y : y + max(1, height), x : x + max(1, width)]
    share_K: NDArray[np.float64] = np.bincount(part.ravel(), minlength=classes) / part.size
    return share_K
