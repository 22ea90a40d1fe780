"""First stage: train the classifier from presence labels. Last stage, with `head_epochs`: train its head again.

Shape suffixes: N views, M labeled patches, B boxes, K classes, C channels, H and W the image, h and w a feature map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.classifier import Classifier
from models.heads import PDA_SCHEDULES, HeadOutput
from pipeline.training.augment import Augmentation
from pipeline.training.config import TrainConfig
from pipeline.training.fit import Processes, Task
from pipeline.training.inputs import as_input, load_start, padded
from pipeline.training.patches import PatchImages, View, draw_places, make_view, view_side


class ClassifierBatch(NamedTuple):
    """The views of one step, with the labels of all patches inside the views."""

    views: Sequence[View]
    weight_2K: Tensor
    """Loss weights of an absent (row 0) and a present class (row 1)."""


def classifier_task(
    classifier: Classifier,
    training: Sequence[PatchImages],
    validation: PatchImages,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
) -> Task:
    """Return the training task: binary cross-entropy of every class on the logits of every labeled patch.

    `training` has the same images at each pixel size at which the classifier is trained. Each step draws one
    pixel size.
    """
    for name, parameter in classifier.backbone.named_parameters():
        if config.pretrained and name.removeprefix("net.").startswith(config.frozen):
            parameter.requires_grad_(False)
    weight_2K = class_weights(training[0].class_frequency(), balance=config.balance).to(device)
    share = range(processes.rank, config.classifier_batch, processes.world)
    augmentation = Augmentation(config.stain, config.imaging, moves=config.classifier_moves)

    def make_batch(rng: np.random.Generator) -> ClassifierBatch:
        count = config.classifier_batch
        # With a single size, no number is drawn: the batches of a seed stay those of earlier versions.
        images = training[int(rng.integers(len(training)))] if len(training) > 1 else training[0]
        places = draw_places(images, config.region, count, rng)
        seeds = rng.integers(2**32, size=count)
        views = [make_view(images, places[n], augmentation, np.random.default_rng(seeds[n])) for n in share]
        return ClassifierBatch(views, weight_2K)

    def loss(batch: ClassifierBatch) -> Tensor:
        return presence_loss(classifier, batch, config, device)

    def begin_epoch(epoch: int) -> None:
        classifier.train()
        if config.pretrained:
            keep_statistics(classifier.backbone)
        if config.attention == "pda":
            classifier.mu = PDA_SCHEDULES[config.pda_schedule].mu(epoch, config.classifier_epochs)
            classifier.normalize_attention = config.normalize_attention

    return Task(
        name="classifier",
        network=classifier,
        new_parameters=[
            parameter
            for name, parameter in classifier.named_parameters()
            if not (config.pretrained and name.startswith("backbone."))
        ],
        make_batch=make_batch,
        loss=loss,
        validate=lambda network: presence_scores(network, validation, config, device),
        begin_epoch=begin_epoch,
        epochs=config.classifier_epochs,
        steps=config.classifier_steps or steps_per_epoch(training, config.region, config.classifier_batch),
        bias_factor=config.bias_factor,
        decay_biases=config.decay_biases,
        momentum=config.momentum,
        step_values=lambda: {} if classifier.mu is None else {"mu": classifier.mu},
    )


def head_task(
    classifier: Classifier,
    training: PatchImages,
    validation: PatchImages,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
) -> Task:
    """Return the training task of the head alone, on the backbone that the segmenter trained, without attention."""
    task = classifier_task(classifier, [training], validation, config, device, processes)
    classifier.backbone.requires_grad_(False)

    def begin_epoch(_epoch: int) -> None:
        classifier.train()
        classifier.backbone.eval()
        classifier.mu = None

    return dataclasses.replace(task, name="head", begin_epoch=begin_epoch, epochs=config.head_epochs)


def build_classifier(config: TrainConfig, classes: int) -> Classifier:
    """Return the classifier of a run with its initial weights.

    Raises ArchitectureError for unknown parts, and TrainError if the weights are missing or do not fit.
    """
    classifier = Classifier(config.backbone, config.head, classes, config.depth, config.layer_heads)
    load_start(classifier.backbone.net, config.weights, config.backbone)
    if config.xavier_head:
        for module in classifier.head.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return classifier


def keep_statistics(network: nn.Module) -> None:
    """Put all batch norms into eval mode, so that they keep their initial statistics (Han et al. 2022)."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def steps_per_epoch(by_size: Sequence[PatchImages], region: int | None, batch: int) -> int:
    """Return the number of steps that draw as many pixels as the images have, averaged over the pixel sizes."""
    shares = [images.pixels() / (view_side(images, region) ** 2 * batch) for images in by_size]
    return max(1, round(sum(shares) / len(shares)))


def class_weights(frequency_K: NDArray[np.float64], *, balance: bool) -> Tensor:
    """Return the loss weights (2, K) of an absent (row 0) and a present (row 1) label of each class, float32.

    With `balance`, absent and present labels of a class have the same total weight, and the mean weight is 1. No weight
    exceeds 10.
    """
    if not balance:
        return torch.ones(2, len(frequency_K))
    shares_2K = np.stack([1 - frequency_K, frequency_K])
    return torch.from_numpy(np.minimum(0.5 / np.maximum(shares_2K, 1e-9), 10.0)).float()


def presence_loss(classifier: Classifier, batch: ClassifierBatch, config: TrainConfig, device: torch.device) -> Tensor:
    """Return the weighted mean binary cross-entropy of all patches of a batch, including the head's auxiliary logits.

    If all weights are 1, this is the multi-label soft margin loss of Han et al. 2022.
    """
    x_NCHW = as_input(np.stack([view.rgb_HWC for view in batch.views]), device, config)
    boxes = [view.boxes_B4 for view in batch.views]
    present_MK = torch.from_numpy(np.concatenate([view.present_BK for view in batch.views])).to(device)
    weight_MK = torch.where(present_MK, batch.weight_2K[1], batch.weight_2K[0])
    output = patch_outputs(classifier, x_NCHW, boxes)
    terms = [
        F.binary_cross_entropy_with_logits(logits_MK.float(), present_MK.float(), weight_MK)
        for logits_MK in (output.logits_NK, *output.auxiliary_NK)
    ]
    return torch.stack(terms).sum()


def patch_outputs(classifier: Classifier, x_NCHW: Tensor, boxes: Sequence[NDArray[np.int64]]) -> HeadOutput:
    """Return the head's output for every box of every image, in order.

    Boxes are in image pixels and have one size. The features of an image are computed once, and each box uses the
    feature cells nearest to the box. Only the stages that have a head are cut into boxes.
    """
    stages = classifier.stages(x_NCHW)
    height, width = x_NCHW.shape[2:]
    if all(len(b) == 1 and tuple(b[0]) == (0, 0, width, height) for b in boxes):
        return classifier.head_output(stages, x_NCHW)
    owner_M = np.repeat(np.arange(len(boxes)), [len(boxes_B4) for boxes_B4 in boxes])

    def cut(map_NChw: Tensor) -> Tensor:
        stride = height // map_NChw.shape[2]
        cells_M4 = np.concatenate([_cells(boxes_B4, stride, map_NChw.shape[2:]) for boxes_B4 in boxes])
        return _windows(map_NChw, owner_M, cells_M4)

    stride = height // stages.deep.shape[2]
    cells_M4 = np.concatenate([_cells(boxes_B4, stride, stages.deep.shape[2:]) for boxes_B4 in boxes])
    crop_MCHW = _windows(x_NCHW, owner_M, cells_M4 * stride)
    cut_stages = {layer: cut(getattr(stages, layer)) for layer in ("deep", *classifier.layer_heads)}
    return classifier.head_output(stages._replace(**cut_stages), crop_MCHW)


def _cells(boxes_B4: NDArray[np.int64], stride: int, size_hw: tuple[int, ...]) -> NDArray[np.int64]:
    """Return boxes in feature cells. Corner and side are rounded separately, so that equal boxes stay equal."""
    sides_B2 = np.maximum(1, np.rint(boxes_B4[:, 2:] / stride)).astype(np.int64)
    last_B2 = np.array([size_hw[1], size_hw[0]]) - sides_B2
    corners_B2 = np.minimum(np.rint(boxes_B4[:, :2] / stride).astype(np.int64), last_B2)
    return np.concatenate([corners_B2, sides_B2], axis=1)


def _windows(maps_NChw: Tensor, owner_M: NDArray[np.int64], boxes_M4: NDArray[np.int64]) -> Tensor:
    """Return boxes of one size, cropped from the map of the image `owner_M`: (M, C, box height, box width)."""
    count, channels, height, width = maps_NChw.shape
    (w, h) = boxes_M4[0, 2:].tolist()
    rows_Mh = boxes_M4[:, 1, None] + np.arange(h)
    columns_Mw = boxes_M4[:, 0, None] + np.arange(w)
    index_Mhw = (owner_M[:, None, None] * height + rows_Mh[:, :, None]) * width + columns_Mw[:, None, :]
    # A single gather of rows, because the gradient of each slice would be a whole map of zeros.
    flat_PC = maps_NChw.permute(0, 2, 3, 1).reshape(count * height * width, channels)
    picked = flat_PC.index_select(0, torch.from_numpy(index_Mhw.ravel()).to(flat_PC.device))
    return picked.view(len(boxes_M4), h, w, channels).permute(0, 3, 1, 2)


def held_out_batches(
    images: PatchImages, *, whole: bool, limit: int = 32
) -> Iterator[tuple[NDArray[np.uint8], list[NDArray[np.int64]], NDArray[np.bool_]]]:
    """Yield (rgb_NHWC, boxes of each image, present_MK) over all labeled patches, in order and without augmentation.

    With `whole`, batch whole images of one size, mirrored to sides that the networks accept; otherwise pass each
    labeled patch alone. A batch has at most `limit` patches, or one image.
    """
    held: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]] = []
    patches = 0
    for rgb_HWC, boxes_B4, present_BK in _held_out(images, whole=whole):
        if held and (held[0][0].shape != rgb_HWC.shape or patches + len(boxes_B4) > limit):
            yield _stacked(held)
            held, patches = [], 0
        held.append((rgb_HWC, boxes_B4, present_BK))
        patches += len(boxes_B4)
    if held:
        yield _stacked(held)


def _held_out(
    images: PatchImages, *, whole: bool
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]]:
    for index in range(len(images)):
        rgb_HWC = images.rgb(index)
        if whole:
            yield padded(rgb_HWC[None])[0], images.boxes[index], images.present[index]
            continue
        for (x, y, width, height), present_K in zip(images.boxes[index].tolist(), images.present[index], strict=True):
            yield rgb_HWC[y : y + height, x : x + width], np.array([[0, 0, width, height]]), present_K[None]


def _stacked(
    held: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]],
) -> tuple[NDArray[np.uint8], list[NDArray[np.int64]], NDArray[np.bool_]]:
    return np.stack([one[0] for one in held]), [one[1] for one in held], np.concatenate([one[2] for one in held])


@torch.inference_mode()
def presence_scores(
    network: nn.Module, images: PatchImages, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Return the class-balanced loss, the mean average precision of presence and of absence, and their mean, "score".

    All labeled patches count. The score uses precisions because ranking still improves after overconfidence has started
    to raise the loss.
    """
    assert isinstance(network, Classifier)
    logits, present = [], []
    for rgb_NHWC, boxes, present_MK in held_out_batches(images, whole=config.region is not None):
        logits.append(patch_outputs(network, as_input(rgb_NHWC, device, config), boxes).logits_NK.float().cpu())
        present.append(present_MK)
    logits_MK, present_MK = torch.cat(logits), np.concatenate(present)
    weight_2K = class_weights(present_MK.mean(axis=0), balance=True)
    target_MK = torch.from_numpy(present_MK)
    weight_MK = torch.where(target_MK, weight_2K[1], weight_2K[0])
    loss = F.binary_cross_entropy_with_logits(logits_MK, target_MK.float(), weight_MK).item()
    precisions = (
        mean_average_precision(logits_MK.numpy(), present_MK),
        mean_average_precision(-logits_MK.numpy(), ~present_MK),
    )
    # The precision of absence is NaN if no class is ever absent.
    score = float(np.nanmean(precisions))
    return {"loss": loss, "map_present": precisions[0], "map_absent": precisions[1], "score": score}


def mean_average_precision(scores_MK: NDArray[np.float32], truth_MK: NDArray[np.bool_]) -> float:
    """Return the mean over classes of the average precision ``sum_n (R_n - R_n-1) P_n``, as scikit-learn defines it.

    Equal scores count as one threshold. Classes without a positive patch are skipped; the mean of no classes is NaN.
    """
    values = []
    for k in range(truth_MK.shape[1]):
        order = np.argsort(-scores_MK[:, k], kind="stable")
        hits, ranked = truth_MK[order, k].cumsum(), scores_MK[order, k]
        if hits[-1] == 0:
            continue
        last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
        precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
        values.append(float((np.diff(recall, prepend=0.0) * precision).sum()))
    return float(np.mean(values)) if values else float("nan")
