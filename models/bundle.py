"""Model bundles: a folder of model.json, classifier.safetensors and segmenter.safetensors.

A fourth file, familiarity.safetensors, is optional. It describes the training windows, see models/familiarity.py.

Loading a bundle reads its card, which does not import torch. Reading and writing weights does.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.card import ModelCard, SegmenterCard, WeightsCard, parse_card
from models.errors import (
    ArchitectureError,
    DigestMismatchError,
    MissingBundleFileError,
    UnknownBundleError,
    WeightsMismatchError,
)
from models.shipped import SHIPPED_DIGESTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.classifier import Classifier
    from models.familiarity import Statistics
    from models.padding import Mode

DEFAULT_BUNDLE = "colorectal-tissue"
"""Name of the default shipped bundle."""

SHIPPED_FOLDER = Path(__file__).parent / "weights"
CARD_FILE = "model.json"
CLASSIFIER_FILE = "classifier.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"
FAMILIARITY_FILE = "familiarity.safetensors"


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
    bundle = Bundle(parse_card(content, path / CARD_FILE), path, hashlib.sha256(content).hexdigest())
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
    edges: Mode = "reflect" if card.segmenter.trains_backbone else "replicate"
    classifier = Classifier(
        parts.backbone, parts.head, len(card.classes), parts.depth, stride=parts.stride, edges=edges
    )
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

    keeps_backbone = card.shared_backbone and not card.trains_backbone
    return build_segmenter(
        card.encoder, classes, card.depth, card.rates, card.decoder_channels, keeps_backbone=keeps_backbone
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
        # Copying would drop the imaginary part of complex numbers, and round or wrap others.
        strange = sorted(
            name
            for name, tensor in tensors.items()
            if name in wanted and tensor.is_floating_point() != wanted[name].is_floating_point()
        )
        if strange:
            raise WeightsMismatchError(
                f"{file}: the weights {', '.join(strange[:3])} are stored as {tensors[strange[0]].dtype}, but the "
                f"network has {wanted[strange[0]].dtype}; download or export the bundle again"
            )
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
    Raises ArchitectureError if the card's segmenter shares the classifier's backbone, but these networks do not, and
    InvalidCardError for a card with an invalid value.
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
    """Write another card, and the statistics of its `familiarity`, into a bundle whose weights stay the same bytes.

    Raises InvalidCardError for a card with an invalid value; the bundle then stays as it is.
    """
    contents = {file: (bundle.path / file).read_bytes() for file in (CLASSIFIER_FILE, SEGMENTER_FILE)}
    return _write_bundle(bundle.path, card, contents, statistics)


def _write_bundle(folder: Path, card: ModelCard, weights: Mapping[str, bytes], statistics: Statistics | None) -> Bundle:
    """Write the folder under another name and rename it, so that a killed run leaves no incomplete bundle.

    Raises InvalidCardError for a card that could not be read again, before anything is written.
    """
    assert (card.familiarity is None) == (statistics is None)
    contents = dict(weights)
    if card.familiarity is not None and statistics is not None:
        contents[FAMILIARITY_FILE] = statistics.as_bytes()
        digest = hashlib.sha256(contents[FAMILIARITY_FILE]).hexdigest()
        card = card.model_copy(update={"familiarity": card.familiarity.model_copy(update={"statistics": digest})})
    contents[CARD_FILE] = (card.model_dump_json(indent=2) + "\n").encode()
    parse_card(contents[CARD_FILE], folder / CARD_FILE)  # `model_copy` checks nothing, and JSON has no NaN
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not by mkdtemp, whose folders only their owner may open: the permissions are those of the umask.
    work = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        for file, content in contents.items():
            (work / file).write_bytes(content)
        if folder.exists():
            _exchange(folder, work)
        else:
            work.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # exists only after an error, such as a full disk
    return load_bundle(folder.absolute())


def _exchange(folder: Path, work: Path) -> None:
    """Replace a folder by another one. After an error, the old folder is in its place again."""
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        folder.replace(old)
    except OSError:
        old.rmdir()
        raise
    try:
        work.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old)
