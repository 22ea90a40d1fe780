"""Model bundles: a folder of model.json, classifier.safetensors and segmenter.safetensors.

A fourth file, familiarity.safetensors, is optional. It describes the training windows, see models/familiarity.py.

Reading a card does not import torch, so that a command can check its model at once. `load_networks` does.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import (
    ArchitectureError,
    DigestMismatchError,
    InvalidCardError,
    MissingBundleFileError,
    UnknownBundleError,
    WeightsMismatchError,
)
from models.shipped import SHIPPED_DIGESTS
from models.tissue_class import TissueClass

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.classifier import Classifier
    from models.familiarity import Statistics

DEFAULT_BUNDLE = "colorectal-tissue"
"""Name of the default shipped bundle."""

SHIPPED_FOLDER = Path(__file__).parent / "weights"
CARD_FILE = "model.json"
CLASSIFIER_FILE = "classifier.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"
FAMILIARITY_FILE = "familiarity.safetensors"
SCHEMA_VERSION = 3

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Triple = tuple[float, float, float]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

NetworkName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
"""Without colon and slash, because timm downloads "hf-hub:…" and reads the folder of "local-dir:…"."""

NO_DIGEST = "0" * 64
"""Digest in the draft of a card whose weights are not written yet."""


Rate = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ClassifierCard(_Strict):
    """Architecture of the classifier."""

    backbone: NetworkName
    head: Annotated[str, Field(min_length=1)]
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


class WeightsCard(_Strict):
    """SHA-256 digests of the weights files."""

    classifier: Digest
    segmenter: Digest


class FamiliarityCard(_Strict):
    """What counts as unlike the training data of the model."""

    statistics: Digest
    """SHA-256 digest of familiarity.safetensors."""
    window_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Distance that 99 % of the validation windows stay below. Windows beyond it are unfamiliar."""
    share_limit: Fraction
    """A slide gets a warning if a larger share of its tissue is unfamiliar."""


class ModelCard(_Strict):
    """The content of model.json: everything needed to use a model and to decide whether it is suitable."""

    schema_version: Literal[3]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: Annotated[str, Field(min_length=1)]
    classes: Annotated[tuple[TissueClass, ...], Field(min_length=2, max_length=254)]
    mpp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    """Micrometers per pixel of the images that the networks expect."""
    gate_window: Annotated[int, Field(ge=16, le=4096, multiple_of=16)]
    """Side in pixels, at `mpp`, of the windows in which the classifier decides which classes are present."""
    margin: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    """Pixels of context around a prediction: a map keeps only predictions that have this margin on all sides."""
    mean: Triple
    """Subtracted from RGB scaled to 0–1, per channel."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    classifier: ClassifierCard
    segmenter: SegmenterCard
    output_stride: Literal[4] = 4
    gate_thresholds: tuple[Fraction, ...]
    """Threshold per class. The gate accepts a class if its presence probability exceeds the threshold."""
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """The segmenter's logits are divided by this before the softmax."""
    licence: Annotated[str, Field(min_length=1)]
    training_data: Annotated[str, Field(min_length=1)]
    """Data set, attribution, split and supervision."""
    started_from: Digest | None = None
    """SHA-256 of the card of the model that both networks started from; None for a backbone's weights or none."""
    metrics: dict[str, float]
    scope: str = ""
    """What the training data show, in a few words, such as "colon, H&E"."""
    limits: Annotated[str, Field(min_length=1)]
    """Uses that the model is not for."""
    familiarity: FamiliarityCard | None = None
    """None if the model has no statistics of its training data."""
    made_with: dict[str, str] = {}
    """Versions of Python, wsi-segment and libraries, commit of the source, and digest of the training data."""
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


@dataclass(frozen=True)
class Bundle:
    """A checked card and its folder.

    `digest` is the SHA-256 of model.json, which contains the digests of the weights.
    """

    card: ModelCard
    path: Path
    digest: str

    @property
    def shipped(self) -> bool:
        """Return whether the bundle is one of those that this version of wsi-segment ships."""
        return self.digest in SHIPPED_DIGESTS.values()


def shipped_bundles() -> list[str]:
    """Return the names of the shipped bundles, sorted."""
    if not SHIPPED_FOLDER.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED_FOLDER.iterdir() if (folder / CARD_FILE).is_file())


def card_digest(folder: Path) -> str:
    """Return the SHA-256 of the card of a bundle, which contains the digests of the weights."""
    return hashlib.sha256((folder / CARD_FILE).read_bytes()).hexdigest()


def load_bundle(name_or_path: str | Path, digest: str | None = None) -> Bundle:
    """Return the shipped bundle of this name, or the bundle in this folder. Reads the card, not the weights.

    A shipped name takes precedence over a folder of the same name in the working directory; pass "./name" for the
    folder. Raises DigestMismatchError if the card of a shipped bundle has changed, or if the card does not have the
    SHA-256 `digest`. Raises another BundleError if the bundle cannot be used.
    """
    names = shipped_bundles()
    path = SHIPPED_FOLDER / str(name_or_path) if str(name_or_path) in names else Path(name_or_path)
    unknown = UnknownBundleError(
        f"{name_or_path}: neither a shipped model ({', '.join(names) or 'none'}) nor a bundle folder"
    )
    try:
        if not path.is_dir():
            raise unknown
    except OSError as error:  # the name is too long for a file
        raise unknown from error
    for file in (CARD_FILE, CLASSIFIER_FILE, SEGMENTER_FILE):
        if not (path / file).is_file():
            raise MissingBundleFileError(
                f"{path}: {file} is missing; a bundle contains {CARD_FILE}, {CLASSIFIER_FILE} and {SEGMENTER_FILE}"
            )
    content = (path / CARD_FILE).read_bytes()
    bundle = Bundle(_parse_card(content, path / CARD_FILE), path, hashlib.sha256(content).hexdigest())
    if path.parent == SHIPPED_FOLDER and str(name_or_path) in names:
        _check_shipped(bundle)
    if digest is not None and digest.lower() != bundle.digest:
        raise DigestMismatchError(
            f"{name_or_path}: the digest of the model is {bundle.digest}, but {digest} was requested; use the model "
            f"with this digest, or request the other digest"
        )
    return bundle


def _check_shipped(bundle: Bundle) -> None:
    expected = SHIPPED_DIGESTS.get(bundle.path.name)
    if bundle.digest != expected:
        raise DigestMismatchError(
            f"{bundle.path / CARD_FILE}: the SHA-256 is {bundle.digest}, but wsi-segment was shipped with {expected}; "
            f"install wsi-segment again, or copy the folder and pass its path to use it as a model of your own"
        )


def _parse_card(content: bytes, file: Path) -> ModelCard:
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


def load_networks(bundle: Bundle) -> tuple[Classifier, nn.Module]:
    """Return (classifier, segmenter) of the bundle in float32 and eval mode, on the CPU.

    Raises DigestMismatchError if a weights file is not the one that the card names, WeightsMismatchError if the weights
    do not fit the architecture, and ArchitectureError if the architecture does not exist or if the segmenter cannot
    share the classifier's backbone.
    """
    from models.classifier import Classifier
    from models.segmenter import share_backbone

    card = bundle.card
    parts = card.classifier
    classifier = Classifier(parts.backbone, parts.head, len(card.classes), parts.depth, stride=parts.stride)
    _load_weights(classifier, bundle.path / CLASSIFIER_FILE, card.weights.classifier)
    segmenter = segmenter_of(card.segmenter, len(card.classes))
    if card.segmenter.shared_backbone:
        try:
            share_backbone(segmenter, classifier)
        except ArchitectureError as error:
            place = bundle.path / CARD_FILE
            raise ArchitectureError(f"{place}: segmenter.shared_backbone is true, but {error}") from error
    _load_weights(_stored_part(segmenter, card), bundle.path / SEGMENTER_FILE, card.weights.segmenter)
    return classifier.eval(), segmenter.eval()


def segmenter_of(card: SegmenterCard, classes: int) -> nn.Module:
    """Return a card's segmenter with random weights. Raises ArchitectureError if the architecture does not exist."""
    from models.segmenter import build_segmenter

    return build_segmenter(
        card.encoder, classes, card.depth, card.rates, card.decoder_channels, shared_backbone=card.shared_backbone
    )


def _stored_part(segmenter: nn.Module, card: ModelCard) -> nn.Module:
    """Return the part of a segmenter that its file contains: all but an encoder that is the classifier's backbone."""
    from torch import nn

    if not card.segmenter.shared_backbone:
        return segmenter
    return nn.ModuleDict({name: part for name, part in segmenter.named_children() if name != "encoder"})


def load_statistics(bundle: Bundle) -> Statistics | None:
    """Return the statistics of the training windows, or None if the bundle has none.

    Raises MissingBundleFileError, DigestMismatchError if the file is not the one that the card names, and
    WeightsMismatchError if it cannot be read.
    """
    from models.familiarity import Statistics

    if bundle.card.familiarity is None:
        return None
    file = bundle.path / FAMILIARITY_FILE
    if not file.is_file():
        raise MissingBundleFileError(f"{bundle.path}: {FAMILIARITY_FILE} is missing, but {CARD_FILE} names it")
    content = _checked_content(file, bundle.card.familiarity.statistics)
    try:
        return Statistics.from_bytes(content)
    except WeightsMismatchError as error:
        raise WeightsMismatchError(f"{file}: {error}") from error


def _checked_content(file: Path, expected: str) -> bytes:
    content = file.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DigestMismatchError(
            f"{file}: the SHA-256 is {actual}, but {CARD_FILE} has {expected}; download or export the bundle again"
        )
    return content


def _load_weights(network: nn.Module, file: Path, expected: str) -> None:
    import safetensors
    import safetensors.torch

    content = _checked_content(file, expected)
    wanted = network.state_dict()
    try:
        tensors = safetensors.torch.load(content)
        network.load_state_dict({name: _as_loaded(tensor) for name, tensor in tensors.items()})
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsMismatchError(
            f"{file}: the weights do not fit the architecture in {CARD_FILE} ({len(wanted)} tensors): {error}"
        ) from error


def _as_loaded(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_stored(tensor: Tensor) -> Tensor:
    # Kernels in float16 halve the file size. Vectors (biases, batch-norm statistics) are small, and a running variance
    # can exceed the range of float16.
    stored = tensor.detach().cpu().contiguous()
    return stored.half() if stored.is_floating_point() and stored.ndim > 1 else stored


def _serialize(network: nn.Module) -> bytes:
    import safetensors.torch

    return safetensors.torch.save({name: _as_stored(tensor) for name, tensor in network.state_dict().items()})


def save_bundle(
    folder: Path, card: ModelCard, classifier: nn.Module, segmenter: nn.Module, statistics: Statistics | None = None
) -> Bundle:
    """Write the bundle folder, replace an existing one, and return the loaded bundle.

    Kernels are stored in float16 and vectors in float32. An encoder that is the classifier's backbone is not stored: a
    loaded segmenter has the classifier's weights there. `weights` of the card is set to the digests of the files. The
    card has `familiarity` if there are `statistics`.
    Raises ArchitectureError if the card's segmenter shares the classifier's backbone, but these networks do not.
    """
    if card.segmenter.shared_backbone:
        _check_shared(segmenter, classifier)
    contents = {CLASSIFIER_FILE: _serialize(classifier), SEGMENTER_FILE: _serialize(_stored_part(segmenter, card))}
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    weights = WeightsCard(classifier=digests[CLASSIFIER_FILE], segmenter=digests[SEGMENTER_FILE])
    return _write_bundle(folder, card.model_copy(update={"weights": weights}), contents, statistics)


def _check_shared(segmenter: nn.Module, classifier: nn.Module) -> None:
    """Raise ArchitectureError unless the segmenter's encoder has the weights of the classifier's backbone."""
    import torch

    from models.segmenter import encoder_network

    backbone: Any = classifier.backbone
    ours, theirs = encoder_network(segmenter).state_dict(), backbone.net.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise ArchitectureError(
            "segmenter.shared_backbone is true, but the segmenter's encoder is not the classifier's backbone; "
            "its weights would be lost"
        )


def replace_card(bundle: Bundle, card: ModelCard, statistics: Statistics | None) -> Bundle:
    """Write another card, and the statistics of its `familiarity`, into a bundle whose weights stay the same bytes."""
    contents = {file: (bundle.path / file).read_bytes() for file in (CLASSIFIER_FILE, SEGMENTER_FILE)}
    return _write_bundle(bundle.path, card, contents, statistics)


def _write_bundle(folder: Path, card: ModelCard, weights: Mapping[str, bytes], statistics: Statistics | None) -> Bundle:
    """Write the folder under another name and rename it, so that a killed run leaves no incomplete bundle."""
    assert (card.familiarity is None) == (statistics is None)
    contents = dict(weights)
    if card.familiarity is not None and statistics is not None:
        contents[FAMILIARITY_FILE] = statistics.as_bytes()
        digest = hashlib.sha256(contents[FAMILIARITY_FILE]).hexdigest()
        card = card.model_copy(update={"familiarity": card.familiarity.model_copy(update={"statistics": digest})})
    contents[CARD_FILE] = (card.model_dump_json(indent=2) + "\n").encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    work.chmod(0o755)
    for file, content in contents.items():
        (work / file).write_bytes(content)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(old)
        work.replace(folder)
        shutil.rmtree(old)
    else:
        work.replace(folder)
    return load_bundle(folder.absolute())
