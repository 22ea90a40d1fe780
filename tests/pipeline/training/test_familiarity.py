"""The statistics of training images, and the command that adds them to a bundle."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from models.bundle import CLASSIFIER_FILE, SEGMENTER_FILE, load_bundle, load_statistics, save_bundle
from models.card import ClassifierCard, ModelCard, SegmenterCard
from models.classifier import Classifier
from models.familiarity import fit_changes, shrunk_covariance, window_features
from models.familiarity import textures as textures_of
from models.segmenter import build_segmenter
from pipeline.cli.familiarity import app
from pipeline.errors import TrainError
from pipeline.training.changes import CHANGES
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset, samples
from pipeline.training.familiarity import COPIES, SHARE_LIMIT, Source, fit_familiarity, recolored
from pipeline.training.inputs import Scale, as_input, padded
from pipeline.training.patches import PatchImages
from pipeline.training.provenance import data_digest
from tests.models.networks import make_card
from tests.pipeline.training.single_tissue import with_whole_images, write_other, write_tiles
from tests.textures import write_textures

CPU = torch.device("cpu")

CUT = """
[[compose.cut]]
dataset = "ebhi-seg"
folder = "../other"
column = "gland_class"

[[compose.cut.tissues]]
classes = ["a"]
mask = "gland"
share = [0.9, 1.0]
sides = [64]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_textures(tmp_path_factory.mktemp("data"), train=6, val=5, test=1, size=64)


@pytest.fixture(scope="module")
def textures(data: Path) -> Dataset:
    return load_dataset(str(data))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(2)
    return Classifier("tf_efficientnet_lite0", "gap", 3, 3).eval()


def images_of(textures: Dataset, split: str, most: int = 99) -> PatchImages:
    return PatchImages(textures, samples(textures, split)[:most], 1.0)  # type: ignore[arg-type]  # a literal


def features_of(classifier: Classifier, rgb_HWC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return (
            window_features(textures_of(classifier.stages(as_input(padded(rgb_HWC[None]), CPU, TrainConfig()))), 8)
            .flatten(0, 2)
            .numpy()
        )


def whitened(features_NC: np.ndarray, *sources: np.ndarray) -> np.ndarray:
    """Return the distances of windows from the nearest source, in float64."""
    distances = []
    for source_NC in sources:
        centered_NC = features_NC.astype(np.float64) - source_NC.mean(axis=0)
        precision_CC = np.linalg.inv(shrunk_covariance(source_NC.astype(np.float64)))
        distances.append(np.sqrt(np.einsum("nc,cd,nd->n", centered_NC, precision_CC, centered_NC)))
    return np.array(distances)


@pytest.mark.parametrize("sources", [1, 2])
def test_a_distance_is_the_sum_of_two_scaled_parts(textures: Dataset, classifier: Classifier, sources: int) -> None:
    train, val = images_of(textures, "train"), images_of(textures, "val")
    chosen = [(train, val), (val, images_of(textures, "train", most=4))][:sources]
    statistics, card = fit_familiarity(classifier, chosen, TrainConfig(), "cpu")
    familiar, held = [], []
    changed: list[list[np.ndarray]] = [[] for _ in CHANGES]
    for training, validation in chosen:
        rng = np.random.default_rng(0)
        images = [training.rgb(i) for i in range(len(training))]
        seen = [*images, *(recolored(rgb_HWC, rng) for _ in range(COPIES) for rgb_HWC in images)]
        familiar.append(np.concatenate([features_of(classifier, rgb_HWC) for rgb_HWC in seen]))
        for of_kind, change in zip(changed, CHANGES.values(), strict=True):
            windows = [features_of(classifier, change(recolored(image, rng), rng)) for image in images]
            of_kind.append(np.concatenate(windows))
        held.append(np.concatenate([features_of(classifier, validation.rgb(i)) for i in range(len(validation))]))
    limit_G = [np.quantile(whitened(mine, source)[0], 0.995) for mine, source in zip(held, familiar, strict=True)]
    held_NC = np.concatenate(held)
    nearest_N = (whitened(held_NC, *familiar) / np.array(limit_G)[:, None]).min(axis=0)
    nearest_N /= np.subtract(*np.quantile(nearest_N, [0.995, 0.5]))
    changes = fit_changes(familiar, changed)
    logit_N = changes.logits(torch.from_numpy(held_NC)).numpy()
    low, high = np.quantile(logit_N, [0.5, 0.995])
    expected_N = nearest_N + np.maximum((logit_N - low) / (high - low) + 1, 0)
    assert statistics.distances(torch.from_numpy(held_NC)).numpy() == pytest.approx(expected_N, rel=1e-2)
    assert card.window_limit == pytest.approx(np.quantile(expected_N, 0.995), rel=1e-2)
    assert card.share_limit == SHARE_LIMIT


def test_changed_images_have_evidence_of_a_change(tmp_path: Path, classifier: Classifier) -> None:
    # The scale of the evidence comes from the validation images, and five of them would be too few.
    textures = load_dataset(str(write_textures(tmp_path, train=24, val=20, test=9, size=64)))
    training, validation = images_of(textures, "train"), images_of(textures, "val")
    statistics, _ = fit_familiarity(classifier, [(training, validation)], TrainConfig(), "cpu")
    assert statistics.changes is not None
    rng = np.random.default_rng(5)
    new = images_of(textures, "test")
    evidence = {
        name: np.median(
            [
                statistics.changes.logits(torch.from_numpy(features_of(classifier, change(new.rgb(n), rng)))).numpy()
                for n in range(len(new))
            ]
        )
        for name, change in {"none": lambda rgb_HWC, _: rgb_HWC, **CHANGES}.items()
    }
    # Validation windows have 1 in the middle, and nearly all have at most 2.
    assert evidence.pop("none") < 1.5
    # Random weights and small images of three textures recognize changes of color alone.
    assert min(evidence[name] for name in ("gray", "inverted", "reordered", "turned_hue")) > 2.6, evidence


def test_a_single_validation_window_still_gives_a_usable_scale(textures: Dataset, classifier: Classifier) -> None:
    training, validation = images_of(textures, "train"), images_of(textures, "val", most=1)
    statistics, card = fit_familiarity(classifier, [(training, validation)], TrainConfig(), "cpu")
    held_NC = torch.from_numpy(features_of(classifier, validation.rgb(0)))
    # Its distance is 1 of the 1.01 parts of the limit, and its evidence is 1.
    assert statistics.distances(held_NC).item() == pytest.approx(101, rel=1e-3)
    assert card.window_limit == pytest.approx(101 * 1.01, rel=1e-3)


def test_a_split_without_images_is_refused(textures: Dataset, classifier: Classifier) -> None:
    with pytest.raises(TrainError, match="no readable image"):
        fit_familiarity(
            classifier, [(images_of(textures, "train"), images_of(textures, "val", most=0))], TrainConfig(), "cpu"
        )


def test_recoloring_keeps_the_structure_and_depends_on_the_generator_alone() -> None:
    rgb_HWC = np.random.default_rng(1).integers(60, 200, (32, 48, 3), dtype=np.uint8)
    first, again, other = (recolored(rgb_HWC, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == rgb_HWC.shape
    gray = [image.mean(axis=2).ravel() for image in (rgb_HWC, first)]
    assert np.corrcoef(gray)[0, 1] > 0.7


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path: Path, textures: Dataset, classifier: Classifier) -> Path:
    return save_bundle(tmp_path / "b", _card(textures), classifier, build_segmenter("resnet18", 3)).path


def _card(dataset: Dataset) -> ModelCard:
    return make_card(((1, 2, 3),) * 3).model_copy(
        update={
            "classes": dataset.classes,
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=3),
            "segmenter": SegmenterCard(encoder="resnet18", depth=4, rates=(1, 2, 4)),
        }
    )


def test_the_command_adds_statistics_and_scope_to_a_bundle(bundle: Path, data: Path) -> None:
    weights = {file: (bundle / file).read_bytes() for file in (CLASSIFIER_FILE, SEGMENTER_FILE)}
    bundle = bundle.rename(bundle.with_name("b\x9b"))
    result = invoke(bundle, data, "--scope", "textures", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert r"b\u009b" in result.stdout
    changed = load_bundle(bundle)
    assert changed.card.familiarity is not None
    assert json.loads(result.stdout) == {
        "bundle": str(bundle),
        "scope": "textures",
        **changed.card.familiarity.model_dump(),
    }
    assert load_statistics(changed) is not None
    assert {file: (bundle / file).read_bytes() for file in weights} == weights


@pytest.mark.parametrize("recorded", ["same", "other", "none"])
def test_the_command_warns_about_data_that_the_model_was_not_trained_with(
    tmp_path: Path,
    classifier: Classifier,
    textures: Dataset,
    data: Path,
    caplog: pytest.LogCaptureFixture,
    recorded: str,
) -> None:
    training, validation = (PatchImages(textures, samples(textures, split), 1.0) for split in ("train", "val"))
    digests = {"same": {"data": data_digest(training, validation)}, "other": {"data": "0" * 64}, "none": {}}
    card = _card(textures).model_copy(update={"made_with": digests[recorded]})
    path = save_bundle(tmp_path / "b", card, classifier, build_segmenter("resnet18", 3)).path
    result = invoke(path, data, "--device", "cpu")
    assert result.exit_code == 0, result.output
    warned = [message for message in caplog.messages if "was trained with other images, masks or labels" in message]
    assert len(warned) == (recorded == "other")
    assert load_bundle(path).card.familiarity is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_command_names_the_bundle_that_cannot_be_written_and_the_cause(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipeline.training.familiarity.add_familiarity", fail)
    result = invoke(bundle, data, "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == (
        f"wsi-familiarity: {bundle}: cannot be written ({os.strerror(number)}); check the free space and your "
        "permissions\n"
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Return a list to which each call of `fit_familiarity` adds its sources."""
    found: list[Source] = []

    def spy(network: nn.Module, sources: Sequence[Source], scale: Scale, device: str) -> Any:
        found.extend(sources)
        return fit_familiarity(network, sources, scale, device)

    monkeypatch.setattr("pipeline.training.familiarity.fit_familiarity", spy)
    return found


def test_whole_images_of_a_data_set_that_images_are_cut_from_are_a_source(
    tmp_path: Path, classifier: Classifier, seen: list[Source]
) -> None:
    tiles = tmp_path / "tiles"
    write_tiles(tiles)
    write_other(tmp_path / "other", {f"case-{n}": "adenocarcinoma" for n in range(20)})
    with (tiles / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write(CUT)
    dataset = load_dataset(tiles)
    card = _card(dataset)
    path = save_bundle(tmp_path / "b", card, classifier, build_segmenter("resnet18", 3)).path
    result = invoke(path, tiles, "--device", "cpu")
    assert result.exit_code == 0, result.output
    statistics = load_statistics(load_bundle(path))
    assert statistics is not None
    assert len(statistics.mean_GC) == 2
    assert not torch.equal(statistics.mean_GC[0], statistics.mean_GC[1])
    # Several sources with caches of their own could need gigabytes.
    assert len(seen) == 2
    assert all(images.rgb(0) is not images.rgb(0) for images in seen[1])


def test_whole_images_beside_composed_ones_are_a_source_of_their_own(
    tmp_path: Path, classifier: Classifier, seen: list[Source]
) -> None:
    dataset = with_whole_images(tmp_path)
    path = save_bundle(tmp_path / "b", _card(dataset), classifier, build_segmenter("resnet18", 3)).path
    result = invoke(path, tmp_path / "tiles", "--device", "cpu")
    assert result.exit_code == 0, result.output
    names = [[{sample.name.split("-")[0] for sample in images.samples} for images in source] for source in seen]
    assert names == [[{"train"}, {"val"}], [{"case"}, {"case"}]]


def test_the_command_refuses_shipped_models_and_other_classes(bundle: Path) -> None:
    result = invoke("colon-gland", "ebhi-seg")
    assert result.exit_code == 2
    assert "copy its folder and pass the copy" in result.stderr
    result = invoke(bundle, "ebhi-seg", "--data", bundle)
    assert result.exit_code == 1
    assert "classes" in result.stderr
