"""The model card of a trained model: the facts from its data set and its settings, and its scores."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError

from models.cam import LAYERS
from models.card import NO_DIGEST, ClassifierCard, ModelCard, SegmenterCard, WeightsCard
from pipeline.errors import TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset
from pipeline.training.dataset_sections import Split
from pipeline.training.evaluate import Evaluation


def make_card(dataset: Dataset, config: TrainConfig, window: int, thresholds: tuple[float, ...]) -> ModelCard:
    """Return the model card without metrics and digests.

    Raises TrainError if the data set's description or a name is not valid in a card.
    """
    card = dataset.card
    views = f"regions of {config.region} px" if config.region else "single patches"
    sizes = ", ".join(f"{mpp:g}" for mpp in config.classifier_mpp) or config.mpp
    with_attention = "" if config.attention == "none" else f" with {config.attention} attention"
    layers = ", ".join(
        f"{layer} {weight:g}" for layer, weight in zip(LAYERS, config.layer_weights, strict=True) if weight > 0
    )
    head = f", the head trained again at {config.mpp} um/px on the segmenter's backbone" if config.head_epochs else ""
    # Names only: a path would show the user and the folders of this machine to everyone who gets the model.
    own_encoder = f", the encoder from {Path(config.encoder_weights).name}" if config.encoder_weights else ""
    start = f"the model {config.init}" if config.init else f"{Path(config.weights).name} weights{own_encoder}"
    assert config.mpp is not None
    try:
        return ModelCard(
            schema_version=3,
            name=config.name or card.name,
            description=card.description,
            classes=tuple(spec.tissue_class for spec in card.classes),
            mpp=config.mpp,
            gate_window=window,
            mean=config.mean,
            std=config.std,
            classifier=ClassifierCard(
                backbone=config.backbone, head=config.head, depth=config.depth, stride=config.gate_stride
            ),
            segmenter=SegmenterCard(
                encoder=config.encoder_name,
                depth=config.encoder_depth,
                rates=config.rates,
                decoder_channels=config.decoder_channels,
                shared_backbone=config.shared_backbone,
                trains_backbone=config.head_epochs > 0,
            ),
            margin=config.margin,
            gate_thresholds=thresholds,
            licence=card.licence,
            training_data=(
                f"{card.attribution} Supervision: presence labels of patches only; {views} at {sizes} um/px, "
                f"classifier head {config.head}{with_attention}, "
                f"pseudo masks by {config.cam} at {config.mpp} um/px at the layers {layers}{head}, "
                f"seed {config.seed}, started from {start}."
            ),
            started_from=config.init or None,
            metrics={},
            scope=card.scope,
            limits=card.limits,
            weights=WeightsCard(classifier=NO_DIGEST, segmenter=NO_DIGEST),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "card"
        raise TrainError(
            f"{card.name}: {key} is not valid in a model card: {first['msg']}; "
            "change it in the dataset.toml or the settings"
        ) from error


def score_metrics(split: Split, evaluation: Evaluation) -> dict[str, float]:
    """Return the scores of a split for a model card, with the gate: of the patches, and with masks of the pixels.

    Those of pixels are of protocol `exclude`, with the spread of the mIoU.
    """
    patches = evaluation.patches.scores()
    values = {"balanced": patches.balanced, "exact": patches.exact}
    if evaluation.matrices:
        scores = evaluation.scores()
        values |= {f"iou_{name}": value for name, value in scores.iou.items()}
        values |= {"miou": scores.miou, "fwiou": scores.fwiou, "accuracy": scores.accuracy}
        values["miou_spread"] = evaluation.miou_spread()
    # JSON has no number for the IoU of a class that neither truth nor prediction contains.
    return {f"{split}_{name}": round(value, 4) for name, value in values.items() if not math.isnan(value)}
