"""The card of a model bundle: the content of model.json.

Reading a card does not import torch, so that a command can check its model at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import InvalidCardError
from models.tissue_class import TissueClass

SCHEMA_VERSION = 3

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

NetworkName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
"""Without colon and slash, because timm downloads "hf-hub:…" and reads the folder of "local-dir:…"."""

NO_DIGEST = "0" * 64
"""Digest in the draft of a card whose weights are not written yet."""

Rate = Annotated[int, Field(ge=1, le=64)]
"""Far beyond the useful rates: at stride 16, a rate of 64 reaches 1024 pixels."""

Mean = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
Std = Annotated[float, Field(ge=1e-6, le=1000, allow_inf_nan=False)]
"""With these bounds and those of `Mean`, the networks' input is finite in float32."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tabs and line breaks, and the marks that change the direction of text. Texts of a card
reach terminals and tables."""


def _plain(text: str) -> str:
    if found := _CONTROL.search(text):
        raise ValueError(f"contains the control character {found[0]!a}; remove it")
    return text


def _one_line(text: str) -> str:
    if "\n" in text or "\t" in text:
        raise ValueError("contains a line break or a tab; write it on one line without tabs")
    return _plain(text)


Text = Annotated[str, AfterValidator(_plain)]
Line = Annotated[str, AfterValidator(_one_line)]


MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the name of a model."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ClassifierCard(_Strict):
    """Architecture of the classifier."""

    backbone: NetworkName
    head: Annotated[Line, Field(min_length=1)]
    depth: Annotated[int, Field(ge=3)] | None = None
    """Number of feature stages of the backbone to use; None for the whole backbone."""
    stride: Literal[8, 16] = 8
    """Pixels per cell of the features that the classifier's head reads. The classifier was trained at stride 8. At
    stride 16, it has the same weights and a quarter of the cells, and takes a third of the time."""


class SegmenterCard(_Strict):
    """Architecture of the segmenter, see `models.segmenter.build_segmenter`."""

    encoder: NetworkName
    depth: Annotated[int, Field(ge=3, le=5)]
    """Number of stages of the encoder."""
    rates: tuple[Rate, Rate, Rate]
    """Dilation rates of the ASPP, in cells of the encoder's stride."""
    decoder_channels: Annotated[int, Field(ge=1, le=1024)] = 256
    """Channels of the ASPP and the decoder."""
    shared_backbone: bool = False
    """Whether the encoder is the classifier's backbone. The weights of the segmenter then have no encoder."""
    trains_backbone: bool = False
    """Whether the segmenter trained the shared backbone, and the classifier's head was trained on it. The convolutions
    of both networks then mirror the edges of their input, as those of a segmenter with its own backbone do."""

    @model_validator(mode="after")
    def _trains_a_shared_backbone(self) -> Self:
        if self.trains_backbone and not self.shared_backbone:
            raise ValueError(
                "trains_backbone is true, but shared_backbone is false; set both to true, or both to false"
            )
        return self


class WeightsCard(_Strict):
    """SHA-256 digests of the weights files."""

    classifier: Digest
    segmenter: Digest


class FamiliarityCard(_Strict):
    """What counts as unlike the training data of the model."""

    statistics: Digest
    """SHA-256 digest of familiarity.safetensors."""
    window_limit: Positive
    """Distance that nearly all validation windows stay below. Windows beyond it are unfamiliar."""
    share_limit: Fraction
    """A slide gets a warning if a larger share of its tissue is unfamiliar."""


class ModelCard(_Strict):
    """The content of model.json: everything needed to use a model and to decide whether it is suitable."""

    schema_version: Literal[3]
    name: Annotated[str, Field(pattern=MODEL_NAME)]
    description: Annotated[Text, Field(min_length=1)]
    classes: Annotated[tuple[TissueClass, ...], Field(min_length=2, max_length=254)]
    mpp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    """Micrometers per pixel of the images that the networks expect."""
    gate_window: Annotated[int, Field(ge=16, le=4096, multiple_of=16)]
    """Side in pixels, at `mpp`, of the windows in which the classifier decides which classes are present."""
    margin: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    """Pixels of context around a prediction: a map keeps only predictions that have this margin on all sides."""
    mean: tuple[Mean, Mean, Mean]
    """Subtracted from RGB scaled to 0–1, per channel."""
    std: tuple[Std, Std, Std]
    classifier: ClassifierCard
    segmenter: SegmenterCard
    output_stride: Literal[4] = 4
    gate_thresholds: tuple[Fraction, ...]
    """Threshold per class. The gate accepts a class if its presence probability exceeds the threshold."""
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """The segmenter's logits are divided by this before the softmax."""
    licence: Annotated[Text, Field(min_length=1)]
    training_data: Annotated[Text, Field(min_length=1)]
    """Data set, attribution, split and supervision."""
    started_from: Digest | None = None
    """SHA-256 of the card of the model that both networks started from; None if they did not start from a model."""
    metrics: dict[Line, Finite]
    scope: Line = ""
    """What the training data show, in a few words, such as "colon, H&E"."""
    limits: Annotated[Text, Field(min_length=1)]
    """Uses that the model is not for."""
    familiarity: FamiliarityCard | None = None
    """None if the model has no statistics of its training data."""
    made_with: dict[Line, Line] = {}
    """Versions of Python, wsi-segment and libraries, commit of the source, digest of the data, and number of images."""
    weights: WeightsCard

    @model_validator(mode="after")
    def _one_threshold_per_class_and_distinct_names(self) -> Self:
        if len(self.gate_thresholds) != len(self.classes):
            raise ValueError(
                f"{len(self.gate_thresholds)} gate_thresholds for {len(self.classes)} classes; give one per class"
            )
        names = [entry.name for entry in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"class names are not distinct: {names}")
        return self


def parse_card(content: bytes, file: Path) -> ModelCard:
    """Return the card in the content of a file. Raises InvalidCardError, which names the file."""
    try:
        return ModelCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if key == "schema_version":
            found = first["input"] if first["type"] != "missing" else "none"
            remedy = (
                "update wsi-segment"
                if isinstance(found, int) and found > SCHEMA_VERSION
                else "the networks of earlier bundles ran on tiles; train the model again with wsi-train"
            )
            raise InvalidCardError(
                f"{file}: schema_version is {found}, but this version reads {SCHEMA_VERSION}; {remedy}"
            ) from error
        raise InvalidCardError(
            f"{file}: {key or 'not valid JSON'}: {first['msg']} ({error.error_count()} error(s) in total)"
        ) from error
