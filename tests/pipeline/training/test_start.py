"""Runs that start from a model: which weights they take over, and which models they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from models.bundle import load_bundle, load_networks, segmenter_of
from models.classifier import Classifier
from models.segmenter import build_segmenter
from pipeline.errors import TrainConfigError, TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import load_dataset
from pipeline.training.presets import train_config
from pipeline.training.start import (
    HEAD_EPOCHS,
    check_start,
    copy_classes,
    start_from_bundle,
    start_settings,
    with_start,
)
from pipeline.training.train import train
from tests.pipeline.small_bundle import small_bundle
from tests.textures import write_textures


def test_classes_are_copied_by_name_along_every_axis_that_stands_for_classes() -> None:
    stored = torch.arange(9.0).reshape(3, 3)
    own = torch.full((2, 2), -1.0)
    copy_classes(own, stored, (4, 4), [(2, 0)])
    assert own.tolist() == [[8, -1], [-1, -1]]
    own = torch.full((4, 5), -1.0)
    copy_classes(own, torch.arange(10.0).reshape(2, 5), (3, 5), [(1, 0), (0, 3)])
    assert own.tolist() == [[5, 6, 7, 8, 9], [-1] * 5, [-1] * 5, [0, 1, 2, 3, 4]]
    own = torch.full((2, 2), -1.0)
    copy_classes(own, torch.ones(2, 2), (2, 2), [(0, 1)])
    assert own.tolist() == [[1, 1], [1, 1]], "no axis stands for classes"


def test_known_classes_keep_their_weights_and_a_new_one_starts_new(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "small")
    card = bundle.card
    first, second = (one.name for one in card.classes)
    classifier = Classifier(card.classifier.backbone, card.classifier.head, 3, card.classifier.depth)
    segmenter = build_segmenter(card.segmenter.encoder, 3, card.segmenter.depth, card.segmenter.rates)
    before = segmenter.state_dict()["segmentation_head.0.weight"].clone()
    start_from_bundle(bundle, classifier, segmenter, [second, "new", first])
    old_classifier, old_segmenter = load_networks(bundle)
    for own, old in ((classifier, old_classifier), (segmenter, old_segmenter)):
        now, then = own.state_dict(), old.state_dict()
        assert now.keys() == then.keys()
        for name, tensor in then.items():
            if now[name].shape == tensor.shape:
                assert torch.equal(now[name], tensor), name
            else:
                assert torch.equal(now[name][[2, 0]], tensor), name
    assert torch.equal(segmenter.state_dict()["segmentation_head.0.weight"][1], before[1])


def test_the_networks_are_those_of_the_model_and_another_setting_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "small")
    names = [one.name for one in bundle.card.classes]
    config = train_config(of_dataset=start_settings(bundle.card, {}))
    assert config.gate_stride == bundle.card.classifier.stride == 8
    check_start(bundle, config, names)
    assert (config.backbone, config.mpp) == (bundle.card.classifier.backbone, bundle.card.mpp)
    assert config.classifier_epochs < TrainConfig().classifier_epochs
    with pytest.raises(TrainConfigError, match=r"mpp is 0\.5, but the model \S+ has 1\.0; omit this setting"):
        check_start(bundle, dataclasses.replace(config, mpp=0.5), names)
    with pytest.raises(TrainError, match="at least one must have the same name: rename a class"):
        check_start(bundle, config, ["a", "b"])
    with pytest.raises(TrainConfigError, match="the setting init is abc; omit it, and pass the model itself with"):
        with_start(dataclasses.replace(config, init="abc"), bundle)


def test_a_run_from_a_model_with_a_shared_backbone_shares_it_too() -> None:
    bundle = load_bundle("colorectal-tissue")
    card = bundle.card
    config = train_config(of_dataset=start_settings(card, {"stain": 0.5, "shared_backbone": False, "new_rate": 0.1}))
    assert card.segmenter.shared_backbone
    assert (config.decoder_channels, config.shared_backbone) == (card.segmenter.decoder_channels, True)
    assert (config.stain, config.new_rate) == (0.5, 0.1)
    names = [one.name for one in card.classes]
    check_start(bundle, config, names)
    classifier = Classifier(card.classifier.backbone, card.classifier.head, len(names), card.classifier.depth)
    segmenter = segmenter_of(card.segmenter, len(names))
    start_from_bundle(bundle, classifier, segmenter, names)
    for own, stored in zip((classifier, segmenter), load_networks(bundle), strict=True):
        for name, tensor in stored.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor), name


def test_head_epochs_of_a_data_set_have_no_effect_on_a_model_that_shares_no_backbone() -> None:
    card = load_bundle("colorectal-tissue").card
    apart = card.model_copy(update={"segmenter": card.segmenter.model_copy(update={"shared_backbone": False})})
    of_dataset = {"shared_backbone": True, "head_epochs": 7}
    assert [start_settings(one, of_dataset)["head_epochs"] for one in (card, apart)] == [7, 0]


def test_the_segmenter_trains_the_backbone_of_a_model_if_it_did_so_before() -> None:
    card = load_bundle("colorectal-tissue").card
    trained = card.model_copy(update={"segmenter": card.segmenter.model_copy(update={"trains_backbone": True})})
    assert start_settings(trained, {})["head_epochs"] == HEAD_EPOCHS
    assert start_settings(trained, {"head_epochs": 7})["head_epochs"] == 7
    assert "head_epochs" not in start_settings(card, {})


@pytest.mark.full
def test_a_run_that_starts_from_a_model_names_its_digest_and_resumes_only_from_it(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "textures", train=5, val=2, test=2, size=64))
    small = {"weights": "none", "region": 64, "view": 96, "margin": 32, "position_views": 4, "confidence": 0.0}
    steps = dict.fromkeys(["classifier_epochs", "classifier_batch", "segmenter_epochs", "segmenter_batch"], 2)
    config = train_config(of_dataset=small | steps | {"classifier_steps": 2, "segmenter_steps": 2})
    first = train(dataset, tmp_path / "first", config, device="cpu")
    assert first.card.started_from is None
    still = dataclasses.replace(config, backbone_rate=1e-9, new_rate=1e-9, weight_decay=0.0, ema=0.0)
    second = train(dataset, tmp_path / "second", still, device="cpu", init=first)
    assert second.card.started_from == first.digest
    assert first.digest in second.card.training_data
    # Nothing was learned at this rate, so the weights are those of the first model.
    for own, old in zip(load_networks(second), load_networks(first), strict=True):
        for name, parameter in own.named_parameters():
            assert torch.allclose(parameter, old.get_parameter(name), atol=1e-5), name
    with pytest.raises(TrainError, match=r"started with other settings \(different: init\)"):
        train(dataset, tmp_path / "second", still, device="cpu")
