from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import models.bundle
from models.backbone import Backbone
from models.bundle import (
    CLASSIFIER_FILE,
    DEFAULT_BUNDLE,
    FAMILIARITY_FILE,
    SEGMENTER_FILE,
    SHIPPED_FOLDER,
    load_bundle,
    load_networks,
    load_statistics,
    replace_card,
    save_bundle,
    shipped_bundles,
)
from models.card import NO_DIGEST, ClassifierCard, FamiliarityCard, ModelCard, SegmenterCard
from models.classifier import Classifier
from models.errors import (
    ArchitectureError,
    DigestMismatchError,
    InvalidCardError,
    MissingBundleFileError,
    UnknownBundleError,
    WeightsMismatchError,
)
from models.familiarity import fit_statistics
from models.predictor import Predictor
from models.segmenter import build_segmenter, encoder_network, share_backbone
from models.tissue_class import TissueClass
from tests import shipped_models
from tests.models.networks import make_card


def _real_card() -> ModelCard:
    networks = {
        "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap"),
        "segmenter": SegmenterCard(encoder="resnet18", depth=4, rates=(1, 2, 4)),
    }
    return make_card().model_copy(update=networks)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("saved") / "bündel"
    save_bundle(path, _real_card(), Classifier("tf_efficientnet_lite0", "gap", 2), build_segmenter("resnet18", 2))
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may change."""
    return shutil.copytree(saved, tmp_path / saved.name)


def _rewrite(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_networks_load_in_float32_within_half_precision(tmp_path: Path) -> None:
    classifier, segmenter = Classifier("tf_efficientnet_lite0", "gap", 2), build_segmenter("resnet18", 2)
    bundle = save_bundle(tmp_path / "b", _real_card(), classifier, segmenter)
    for original, loaded in zip((classifier, segmenter), load_networks(bundle), strict=True):
        assert not loaded.training
        state = loaded.state_dict()
        for name, tensor in original.state_dict().items():
            assert state[name].dtype == tensor.dtype
            stored = tensor.half().float() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            assert torch.equal(state[name], stored), name


def test_a_shared_backbone_is_stored_once(tmp_path: Path) -> None:
    classifier = Classifier("tf_efficientnet_lite0", "gap", 2, depth=4)
    segmenter = build_segmenter("tu-tf_efficientnet_lite0", 2, decoder_channels=16, keeps_backbone=True)
    share_backbone(segmenter, classifier)
    parts = SegmenterCard(
        encoder="tu-tf_efficientnet_lite0", depth=4, rates=(1, 2, 4), decoder_channels=16, shared_backbone=True
    )
    own = ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=4, stride=16)
    card = _real_card().model_copy(update={"classifier": own, "segmenter": parts})
    bundle = save_bundle(tmp_path / "b", card, classifier, segmenter)
    stored = safetensors.torch.load_file(bundle.path / SEGMENTER_FILE)
    assert not any(name.startswith("encoder.") for name in stored)
    loaded, other = load_networks(bundle)
    encoder = encoder_network(other).state_dict()
    for name, tensor in loaded.backbone.net.state_dict().items():
        assert torch.equal(encoder[name], tensor), name
    for name, tensor in stored.items():
        assert torch.equal(other.state_dict()[name], tensor.float() if tensor.is_floating_point() else tensor), name

    apart = parts.model_copy(update={"shared_backbone": False})
    save_bundle(tmp_path / "b", card.model_copy(update={"segmenter": apart}), classifier, segmenter)
    _rewrite(bundle.path, {"segmenter": parts.model_dump()})
    with pytest.raises(WeightsMismatchError, match=r"(?s)segmenter.*Unexpected key.*encoder\.model\.conv_stem"):
        load_networks(load_bundle(bundle.path))


@pytest.mark.parametrize("stages", [4, 5])
def test_a_trained_encoder_is_not_dropped_as_a_shared_one(tmp_path: Path, stages: int) -> None:
    classifier = Classifier("tf_efficientnet_lite0", "gap", 2, depth=stages)
    segmenter = build_segmenter("tu-tf_efficientnet_lite0", 2, decoder_channels=16, keeps_backbone=True)
    parts = SegmenterCard(
        encoder="tu-tf_efficientnet_lite0", depth=4, rates=(1, 2, 4), decoder_channels=16, shared_backbone=True
    )
    own = ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=stages, stride=16)
    card = _real_card().model_copy(update={"classifier": own, "segmenter": parts})
    with pytest.raises(ArchitectureError, match=r"encoder is not the classifier's backbone; its weights would be lost"):
        save_bundle(tmp_path / "b", card, classifier, segmenter)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_covers_the_card_and_the_card_contains_the_weights_digests(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.digest == hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    assert bundle.card.weights.classifier == hashlib.sha256((folder / CLASSIFIER_FILE).read_bytes()).hexdigest()


def test_saving_again_replaces_the_bundle_and_leaves_no_other_file(folder: Path) -> None:
    save_bundle(
        folder, _real_card().model_copy(update={"name": "second"}), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    )
    assert load_bundle(folder).card.name == "second"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_the_error_for_an_unknown_name_lists_the_shipped_bundles(tmp_path: Path) -> None:
    with pytest.raises(UnknownBundleError, match=f"lung.*{DEFAULT_BUNDLE}"):
        load_bundle("lung")
    with pytest.raises(UnknownBundleError, match="neither a shipped model"):
        load_bundle("9" * 300)  # no file can have this name


@pytest.mark.parametrize("file", ["model.json", CLASSIFIER_FILE, SEGMENTER_FILE])
def test_the_error_names_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(MissingBundleFileError, match=f"{file} is missing"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "train the model again"), (2, "train the model again"), (4, "update wsi-segment$")]
)
def test_the_error_for_another_schema_version_names_the_supported_one_and_the_remedy(
    folder: Path, version: int, remedy: str
) -> None:
    _rewrite(folder, {"schema_version": version})
    with pytest.raises(InvalidCardError, match=f"schema_version is {version}, but this version reads 3; .*{remedy}"):
        load_bundle(folder)


def test_a_card_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "model.json").write_text("{")
    with pytest.raises(InvalidCardError, match="not valid JSON"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gate_thresholds": [0.5]}, "one per class"),
        ({"gate_thresholds": [0.5, 1.5]}, "gate_thresholds.1"),
        ({"classes": [{"name": "a:b", "color": [0, 0, 0]}, {"name": "c", "color": [0, 0, 0]}]}, "without ':'"),
        ({"classes": [{"name": "", "color": [0, 0, 0]}, {"name": "c", "color": [0, 0, 0]}]}, "classes.0.name"),
        ({"classes": [{"name": "a", "color": [0, 0, 0]}]}, "classes"),
        ({"classes": [{"name": "a", "color": [0, 0, 0]}] * 2}, "not distinct"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}, {"name": "c", "color": [0, 0, 0]}]}, "classes.0.color.2"),
        ({"gate_window": 100}, "gate_window"),
        ({"margin": 40}, "margin"),
        ({"mpp": 0}, "mpp"),
        ({"metrics": {"val_miou": float("nan")}}, "metrics.val_miou"),
        ({"mean": [float("inf"), 0.5, 0.5]}, "mean.0"),
        ({"std": [0.5, float("inf"), 0.5]}, "std.1"),
        ({"mean": [0.5, 1e308, 0.5]}, "mean.1"),
        ({"std": [0.5, 0.5, 1e-300]}, "std.2"),
        ({"segmenter": {"encoder": "resnet18", "depth": 4, "rates": [1, 2, 65]}}, "segmenter.rates.2"),
        ({"scope": "colon\x1b]0;x\x07"}, r"scope: .*contains the control character '\\x1b'; remove it"),
        ({"scope": "colon\nrectum"}, "scope: .*write it on one line"),
        ({"limits": "a\u202eb"}, r"limits: .*control character '\\u202e'"),
        ({"made_with": {"a\x00": "b"}}, "made_with.*control character"),
        ({"surprise": 1}, "surprise"),
        (
            {"segmenter": {"encoder": "resnet18", "depth": 4, "rates": [1, 2, 4], "trains_backbone": True}},
            "segmenter: .*shared_backbone is false",
        ),
    ],
)
def test_the_error_names_the_invalid_field_of_a_card(folder: Path, change: dict[str, Any], named: str) -> None:
    _rewrite(folder, change)
    with pytest.raises(InvalidCardError, match=named):
        load_bundle(folder)


def test_the_error_for_changed_weights_contains_both_digests(folder: Path) -> None:
    expected = load_bundle(folder).card.weights.classifier
    content = bytearray((folder / CLASSIFIER_FILE).read_bytes())
    content[-1] ^= 1
    (folder / CLASSIFIER_FILE).write_bytes(content)
    actual = hashlib.sha256(content).hexdigest()
    with pytest.raises(DigestMismatchError, match=f"{actual}.*{expected}"):
        load_networks(load_bundle(folder))


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    _rewrite(folder, {"segmenter": {"encoder": "resnet34", "depth": 4, "rates": [1, 2, 4]}})
    with pytest.raises(WeightsMismatchError, match=r"segmenter\.safetensors.*do not fit"):
        load_networks(load_bundle(folder))


def test_texts_of_a_card_may_have_several_lines(folder: Path) -> None:
    _rewrite(folder, {"description": "A model\n\tof two lines", "scope": "côlon, H&E"})
    assert load_bundle(folder).card.description == "A model\n\tof two lines"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_weights_of_another_kind_of_number_are_refused(folder: Path, dtype: torch.dtype) -> None:
    file = folder / SEGMENTER_FILE
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    content = safetensors.torch.save(tensors)
    file.write_bytes(content)
    weights = json.loads((folder / "model.json").read_text())["weights"]
    _rewrite(folder, {"weights": weights | {"segmenter": hashlib.sha256(content).hexdigest()}})
    with pytest.raises(
        WeightsMismatchError,
        match=rf"segmenter\.safetensors: .* are stored as {dtype}, but the network has torch.float32",
    ):
        load_networks(load_bundle(folder))


def test_unknown_architecture_is_refused(folder: Path) -> None:
    _rewrite(folder, {"classifier": {"backbone": "no-such-net", "head": "gap"}})
    with pytest.raises(ArchitectureError, match="no-such-net"):
        load_networks(load_bundle(folder))


def test_a_card_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        make_card().classes[0].name = "other"  # type: ignore[misc] # it is frozen
    assert TissueClass("a", (0, 0, 0)).color == (0, 0, 0)


def test_the_default_bundle_is_shipped_and_small() -> None:
    assert DEFAULT_BUNDLE in shipped_bundles()
    bundle = load_bundle(DEFAULT_BUNDLE)
    assert [entry.name for entry in bundle.card.classes] == [
        "tumor",
        "mucosa",
        "stroma",
        "immune",
        "debris",
        "adipose",
        "glass",
    ]
    assert bundle.card.metrics["val_miou"] > 0.7
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) < 20e6
    assert bundle.path == SHIPPED_FOLDER / DEFAULT_BUNDLE


@pytest.mark.parametrize("name", shipped_bundles())
def test_a_shipped_bundle_has_the_name_of_its_folder(name: str) -> None:
    assert load_bundle(name).card.name == name


def test_the_classifier_of_a_bundle_has_the_stride_of_its_card(tmp_path: Path) -> None:
    card, sides = _real_card(), {}
    for stride in (8, 16):
        parts = card.classifier.model_copy(update={"stride": stride})
        networks = Classifier("tf_efficientnet_lite0", "gap", 2), build_segmenter("resnet18", 2)
        bundle = save_bundle(tmp_path / str(stride), card.model_copy(update={"classifier": parts}), *networks)
        with torch.inference_mode():
            sides[stride] = load_networks(bundle)[0].stages(torch.zeros(1, 3, 64, 64)).deep.shape[2]
    assert sides == {8: 8, 16: 4}


def test_a_card_without_a_stride_has_the_stride_of_training(folder: Path) -> None:
    card = json.loads((folder / "model.json").read_text())
    del card["classifier"]["stride"]
    (folder / "model.json").write_text(json.dumps(card))
    assert load_bundle(folder).card.classifier.stride == 8


def test_the_digests_of_the_shipped_bundles_are_those_of_their_cards() -> None:
    assert shipped_models.FILE.read_text(encoding="utf-8") == shipped_models.text(), (
        "run python -m tests.shipped_models"
    )


@pytest.mark.parametrize("key", ["classes", "mpp"])
def test_a_shipped_bundle_with_a_changed_card_is_refused_and_a_copy_is_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    shutil.copytree(SHIPPED_FOLDER / DEFAULT_BUNDLE, tmp_path / DEFAULT_BUNDLE)
    card = json.loads((tmp_path / DEFAULT_BUNDLE / "model.json").read_text())
    changed = card["classes"][::-1] if key == "classes" else card["mpp"] * 2
    monkeypatch.setattr(models.bundle, "SHIPPED_FOLDER", tmp_path)
    assert load_bundle(DEFAULT_BUNDLE).shipped
    _rewrite(tmp_path / DEFAULT_BUNDLE, {key: changed})
    with pytest.raises(DigestMismatchError, match=r"model\.json: the SHA-256 is .*install wsi-segment again"):
        load_bundle(DEFAULT_BUNDLE)
    assert not load_bundle(tmp_path / DEFAULT_BUNDLE).shipped


def test_a_requested_digest_is_required(folder: Path) -> None:
    digest = load_bundle(folder).digest
    assert load_bundle(folder, digest.upper()).digest == digest
    with pytest.raises(DigestMismatchError, match=f"is {digest}, but {'0' * 64} was requested"):
        load_bundle(folder, "0" * 64)


def test_a_backbone_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert Backbone("tf_efficientnet_lite0").channels == 1280


def _with_statistics(folder: Path) -> None:
    statistics = fit_statistics(torch.randn((30, 8), generator=torch.Generator().manual_seed(0)).numpy())
    bundle = load_bundle(folder)
    familiarity = FamiliarityCard(statistics=NO_DIGEST, window_limit=3.5, share_limit=0.5)
    replace_card(bundle, bundle.card.model_copy(update={"familiarity": familiarity, "scope": "colon"}), statistics)


def test_statistics_of_another_number_of_features_are_refused(folder: Path) -> None:
    _with_statistics(folder)
    with pytest.raises(WeightsMismatchError, match=r"have 8 features, .* needs \d+; make them again with `wsi-famil"):
        Predictor.from_bundle(load_bundle(folder), device="cpu")


def test_statistics_are_added_to_a_bundle_whose_weights_stay(folder: Path) -> None:
    before = load_bundle(folder)
    assert load_statistics(before) is None
    weights = {file: (folder / file).read_bytes() for file in (CLASSIFIER_FILE, SEGMENTER_FILE)}
    _with_statistics(folder)
    after = load_bundle(folder)
    assert {file: (folder / file).read_bytes() for file in weights} == weights
    assert after.card.familiarity is not None
    content = (folder / FAMILIARITY_FILE).read_bytes()
    assert after.card.familiarity.statistics == hashlib.sha256(content).hexdigest()
    assert after.card.model_copy(update={"familiarity": None, "scope": ""}) == before.card
    assert after.digest != before.digest
    read = load_statistics(after)
    assert read is not None
    assert read.as_bytes() == content


def test_a_card_that_could_not_be_read_again_does_not_replace_the_old_one(folder: Path) -> None:
    bundle = load_bundle(folder)
    beside = sorted(folder.parent.iterdir())
    with pytest.raises(InvalidCardError, match=r"metrics\.val_miou"):
        replace_card(bundle, bundle.card.model_copy(update={"metrics": {"val_miou": float("nan")}}), None)
    assert load_bundle(folder) == bundle
    assert sorted(folder.parent.iterdir()) == beside


@pytest.mark.full
@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_the_folder_of_a_bundle_has_the_permissions_of_the_umask(folder: Path, umask: int) -> None:
    bundle = load_bundle(folder)
    former = os.umask(umask)
    try:
        replace_card(bundle, bundle.card.model_copy(update={"scope": "new"}), None)
    finally:
        os.umask(former)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~umask}


def test_a_full_disk_leaves_the_old_bundle_and_no_part_of_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(folder)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "model.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        replace_card(bundle, bundle.card.model_copy(update={"scope": "new"}), None)
    assert load_bundle(folder) == bundle
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_bundle_that_cannot_be_renamed_into_its_place_leaves_the_old_one_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    bundle, rename, calls = load_bundle(folder), Path.replace, itertools.count(1)

    def replace(path: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        replace_card(bundle, bundle.card.model_copy(update={"scope": "new"}), None)
    assert load_bundle(folder) == bundle
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_bundle_without_the_statistics_that_its_card_names_is_refused(folder: Path) -> None:
    _with_statistics(folder)
    (folder / FAMILIARITY_FILE).write_bytes(b"changed")
    with pytest.raises(DigestMismatchError, match=FAMILIARITY_FILE):
        load_statistics(load_bundle(folder))
    (folder / FAMILIARITY_FILE).unlink()
    with pytest.raises(MissingBundleFileError, match=FAMILIARITY_FILE):
        load_statistics(load_bundle(folder))
