from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image

from models.bundle import load_bundle, load_networks, load_statistics
from models.cam import LAYERS, LayerMaps, layer_maps
from models.card import NO_DIGEST
from models.classifier import Classifier
from models.padding import ExtendedConv2d
from models.predictor import Predictor
from models.shared_stages import split_networks
from pipeline.errors import TrainError
from pipeline.training import fit as loop
from pipeline.training.calibration import calibrate_temperature
from pipeline.training.dataset import Dataset, load_dataset, samples
from pipeline.training.evaluate import evaluate
from pipeline.training.gate_calibration import calibrate_gate, patch_presence
from pipeline.training.model_card import score_metrics
from pipeline.training.patches import PatchImages
from pipeline.training.position import edge_profile, position_metrics
from pipeline.training.prepare import training_images
from pipeline.training.provenance import data_digest
from pipeline.training.train import train
from tests.cases import full
from tests.pipeline.training.short_run import CONFIG, Killed
from tests.pipeline.training.single_tissue import TILE, with_whole_images
from tests.textures import write_crops, write_textures

STAGES = ("classifier", "segmenter")


@pytest.fixture(scope="module")
def unbroken(textures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a complete, uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(textures, run, CONFIG, device="cpu")
    return run


def products(run: Path) -> dict[str, bytes]:
    """Return the content of the files that depend on the weights, by path below the run folder."""
    files = [run / f"{stage}.safetensors" for stage in STAGES]
    files += [*(run / "pseudo-masks").rglob("*.png"), *(run / "bundle").iterdir(), *run.glob("*.steps.csv")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_a_run_leaves_products_curves_and_a_valid_bundle_but_no_checkpoint(unbroken: Path, textures: Dataset) -> None:
    names = {file.name for file in unbroken.iterdir()}
    assert names == {
        "run.json",
        "pseudo-masks",
        "pseudo-masks.csv",
        "bundle",
        "calibration.png",
        *(f"{stage}.{end}" for stage in STAGES for end in ("safetensors", "csv", "png", "steps.csv")),
    }
    assert len(list((unbroken / "pseudo-masks" / "deep").iterdir())) == 5
    bundle = load_bundle(unbroken / "bundle")
    assert [spec.name for spec in bundle.card.classes] == ["dots", "stripes", "plain"]
    assert (bundle.card.mpp, bundle.card.gate_window, bundle.card.margin) == (1.0, 64, 32)
    assert bundle.card.classifier.stride == CONFIG.gate_stride == 16
    assert bundle.card.familiarity is not None
    evaluation = evaluate(Predictor.from_bundle(bundle, device="cpu", output_stride=1), textures, "val")
    found = evaluation.scores()
    # After so little training a class may never be predicted, which makes its IoU NaN.
    values = {f"iou_{name}": iou for name, iou in found.iou.items() if not math.isnan(iou)}
    values |= {"miou": found.miou, "fwiou": found.fwiou, "accuracy": found.accuracy}
    values["miou_spread"] = evaluation.miou_spread()
    patches = evaluation.patches.scores()
    values |= {"balanced": patches.balanced, "exact": patches.exact}
    validation = PatchImages(textures, samples(textures, "val"), 1.0)
    profile_KD = edge_profile(load_networks(bundle)[1], validation, CONFIG, torch.device("cpu"))
    expected = {f"val_{name}": round(value, 4) for name, value in values.items()}
    expected |= {name: value for name, value in bundle.card.metrics.items() if "ece" in name}
    assert bundle.card.metrics == expected | position_metrics(profile_KD, CONFIG.margin)
    assert "val_position_deviation" in bundle.card.metrics


@pytest.mark.full
def test_a_model_of_composed_and_whole_images_knows_both_as_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Networks cannot be trained on tiles of one color.
    monkeypatch.setattr("pipeline.training.train._stage", lambda _, task, *__: task.network.eval())
    monkeypatch.setattr("pipeline.training.train.segmenter_task", lambda network, *_: SimpleNamespace(network=network))
    dataset = with_whole_images(tmp_path)
    bundle = train(dataset, tmp_path / "run", CONFIG, device="cpu")
    statistics = load_statistics(bundle)
    assert statistics is not None
    assert len(statistics.mean_GC) == 2
    (made,) = (tmp_path / "run").glob("composed-*")
    whole = len(list((made / "train" / "img").glob("ebhi-seg-*.png")))
    assert whole > 0
    assert len(list((tmp_path / "run" / "pseudo-masks" / "deep").iterdir())) == 3 + whole
    for file in (tmp_path / "tiles" / "A").iterdir():
        Image.new("RGB", (TILE, TILE), (9, 9, 9)).save(file)
    with pytest.raises(TrainError, match="the images, masks or labels have changed since the run was started"):
        train(dataset, tmp_path / "run", CONFIG, device="cpu")


def test_only_the_option_test_measures_the_test_split_also_of_a_finished_run(
    unbroken: Path, textures: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    before = load_bundle(unbroken / "bundle")
    assert not [name for name in before.card.metrics if name.startswith("test_")]
    bundle = train(textures, run, CONFIG, device="cpu", test=True)
    evaluation = evaluate(Predictor.from_bundle(bundle, device="cpu", output_stride=1), textures, "test")
    assert bundle.card.metrics == before.card.metrics | score_metrics("test", evaluation)
    assert bundle.card.metrics["test_miou"] == round(evaluation.scores().miou, 4)
    assert bundle.card.model_copy(update={"metrics": before.card.metrics}) == before.card
    unchanged = products(run)
    assert train(textures, run, CONFIG, device="cpu", test=True) == bundle
    assert products(run) == unchanged


def test_a_bundle_without_the_familiarity_check_has_the_same_networks_and_scores(
    unbroken: Path, textures: Dataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("bundle"))
    before, bundle = load_bundle(unbroken / "bundle"), train(textures, run, CONFIG, device="cpu", familiarity=False)
    assert load_statistics(before) is not None
    assert load_statistics(bundle) is None
    assert bundle.card == before.card.model_copy(update={"familiarity": None})


def test_the_temperature_is_fitted_to_the_masks_of_the_validation_images(unbroken: Path, textures: Dataset) -> None:
    bundle = load_bundle(unbroken / "bundle")
    images = PatchImages(textures, samples(textures, "val"), 1.0)
    card = bundle.card.model_copy(update={"temperature": 1.0})
    expected = calibrate_temperature(Predictor(card, NO_DIGEST, *load_networks(bundle)), images)
    assert bundle.card.temperature == expected.temperature != 1
    assert len(expected.metrics()) == 2
    assert expected.metrics().items() <= bundle.card.metrics.items()


def test_the_thresholds_are_calibrated_on_the_validation_images(unbroken: Path, textures: Dataset) -> None:
    bundle = load_bundle(unbroken / "bundle")
    images = PatchImages(textures, samples(textures, "val"), 1.0)
    presence_NK, held_NK = patch_presence(load_networks(bundle)[0], images, CONFIG, torch.device("cpu"))
    expected = calibrate_gate(presence_NK, held_NK, CONFIG.gate_recall)
    assert bundle.card.gate_thresholds == expected


def test_a_second_run_does_no_work(unbroken: Path, textures: Dataset) -> None:
    before = {file: file.stat().st_mtime_ns for file in unbroken.rglob("*")}
    seen: list[str] = []
    bundle = train(textures, unbroken, CONFIG, device="cpu", progress=lambda what, *_: seen.append(what))
    assert {file: file.stat().st_mtime_ns for file in unbroken.rglob("*")} == before
    assert set(seen) == {"pseudo masks"}
    assert bundle == load_bundle((unbroken / "bundle").absolute())


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        full("classifier", 1),
        full("classifier", 3),
        full("pseudo masks", 2),
        full("segmenter", 1),
        full("segmenter", 3),
        full("segmenter", 4),
    ],
)
def test_a_run_killed_in_any_stage_and_restarted_ends_with_the_same_bytes(
    unbroken: Path, textures: Dataset, tmp_path: Path, stage: str, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    run = tmp_path / "broken"

    def kill(what: str, step: int, _total: int) -> None:
        if (what, step) == (stage, done):
            raise Killed

    if stage == "segmenter":  # what comes before is the same in all runs
        shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("bundle", "segmenter.*"))
    with pytest.raises(Killed):
        train(textures, run, CONFIG, device="cpu", progress=kill)
    assert not (run / "bundle").exists()
    train(textures, run, CONFIG, device="cpu")
    assert products(run) == products(unbroken)
    assert not list(run.glob("*.checkpoint.*"))


def test_a_resumed_run_makes_the_same_grad_cam_maps_to_the_bit(
    textures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of few images rarely show a difference in bits, so the test compares maps."""
    config = dataclasses.replace(
        CONFIG, cam="grad-cam", layer_weights=(0.2, 0.2, 0.6), classifier_epochs=1, classifier_steps=1
    )
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.randn(2, 3, 64, 64, generator=generator)
    made: list[LayerMaps] = []

    def make_maps(_folder: Path, classifier: Classifier, *_: object) -> None:
        made.append(layer_maps(config.cam, classifier, x_NCHW))
        raise Killed

    monkeypatch.setattr("pipeline.training.train.write_pseudo_masks", make_maps)
    for _ in range(2):
        with pytest.raises(Killed):
            train(textures, tmp_path / "run", config, device="cpu")
    trained, loaded = made
    for layer in LAYERS:
        assert torch.equal(getattr(trained, layer), getattr(loaded, layer)), layer


@pytest.mark.full
@pytest.mark.parametrize("done", [1, 3])
def test_a_run_whose_segmenter_trains_the_shared_backbone_resumes_its_last_stage(
    textures: Dataset, tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    config = dataclasses.replace(CONFIG, shared_backbone=True, head_epochs=2, layer_weights=(0.0, 0.3, 0.7))
    train(textures, tmp_path / "whole", config, device="cpu")
    run = tmp_path / "broken"

    def kill(what: str, step: int, _total: int) -> None:
        if (what, step) == ("head", done):
            raise Killed

    with pytest.raises(Killed):
        train(textures, run, config, device="cpu", progress=kill)
    assert not (run / "bundle").exists()
    bundle = train(textures, run, config, device="cpu")
    assert products(run) == products(tmp_path / "whole")
    assert not list(run.glob("*.checkpoint.*"))
    # The finished classifier has the backbone of the segmenter and the head of the last stage.
    assert bundle.card.segmenter.shared_backbone
    first, last, segmenter = (
        safetensors.torch.load_file(run / f"{stage}.safetensors") for stage in ("classifier", "head", "segmenter")
    )
    assert any(name.startswith("layer_heads.") for name in first)
    for name, tensor in last.items():
        assert not name.startswith("layer_heads.")
        if name.startswith("backbone.net."):
            assert torch.equal(tensor, segmenter[name.replace("backbone.net.", "encoder.model.")])
    name = "backbone.net.blocks.3.0.conv_pw.weight"
    assert not torch.equal(last[name], first[name])
    assert not torch.equal(last["head.conv.weight"], first["head.conv.weight"])
    classifier, trained = load_networks(bundle)
    assert torch.equal(classifier.state_dict()[name], last[name].half().float())
    # Both continue their input as the segmenter did in training, so a run computes the backbone once.
    assert bundle.card.segmenter.trains_backbone
    modes = [m.mode for network in (classifier, trained) for m in network.modules() if isinstance(m, ExtendedConv2d)]
    assert set(modes) == {"reflect"}
    assert split_networks(classifier, trained, bundle.card.margin).shared_deep is not None


def test_another_seed_gives_other_weights(unbroken: Path, textures: Dataset, tmp_path: Path) -> None:
    stop = dataclasses.replace(CONFIG, seed=1, classifier_epochs=1)

    def kill(what: str, *_: int) -> None:
        if what != "classifier":
            raise Killed

    with pytest.raises(Killed):
        train(textures, tmp_path, stop, device="cpu", progress=kill)
    ours, others = (safetensors.torch.load_file(run / "classifier.safetensors") for run in (tmp_path, unbroken))
    assert not torch.equal(ours["head.conv.weight"], others["head.conv.weight"])


@pytest.mark.full
def test_the_published_recipe_trains_on_patches_of_an_unaligned_side(tmp_path: Path) -> None:
    dataset = load_dataset(write_crops(tmp_path / "data", {"a": (40, 40), "b": (80, 40)}, side=40, stride=40))
    config = dataclasses.replace(
        CONFIG,
        head="gap",
        attention="pda",
        region=None,
        cam="grad-cam",
        layer_weights=(0.2, 0.2, 0.6),
        overlap_labels=False,
        classifier_epochs=1,
        segmenter_epochs=1,
    )
    bundle = train(dataset, tmp_path / "run", config, device="cpu")
    assert bundle.card.gate_window == 32
    assert set(bundle.card.metrics) >= {"val_miou", "val_ece", "val_ece_uncalibrated", "val_position_deviation"}
    with Image.open(tmp_path / "run" / "pseudo-masks" / "shallow" / "b.png") as picture:
        assert picture.size == (80, 40)


@pytest.mark.full
def test_the_gate_has_windows_of_the_training_patches_also_if_validation_images_are_larger(tmp_path: Path) -> None:
    toml = write_textures(tmp_path / "data", train=5, val=2, test=1, size=64)
    write_textures(tmp_path / "larger", train=1, val=2, test=1, size=96)
    shutil.rmtree(tmp_path / "data" / "val")
    shutil.copytree(tmp_path / "larger" / "val", tmp_path / "data" / "val")
    config = dataclasses.replace(
        CONFIG, region=None, classifier_epochs=1, classifier_steps=1, segmenter_epochs=1, segmenter_steps=1
    )
    bundle = train(load_dataset(toml), tmp_path / "run", config, device="cpu")
    assert bundle.card.gate_window == 64


def test_the_run_and_its_bundle_record_versions_commit_and_data(unbroken: Path, textures: Dataset) -> None:
    recorded = json.loads((unbroken / "run.json").read_text(encoding="utf-8"))["made_with"]
    assert {"python", "wsi-segment", "torch", "data"} <= set(recorded)
    assert load_bundle(unbroken / "bundle").card.made_with == recorded
    training, validation = (PatchImages(textures, samples(textures, split), 1.0) for split in ("train", "val"))
    assert recorded["data"] == data_digest(training, validation)
    assert recorded["images"] == "5 training and 2 validation images"


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path, train=101, val=2, test=0, size=16))
    samples(dataset, "train")[7].image.write_bytes(b"")
    training, validation = training_images(dataset, 1.0)
    assert (len(training), training.unreadable) == (100, 1)
    assert (len(validation), validation.unreadable) == (2, 0)


def test_a_run_with_other_settings_changes_nothing(unbroken: Path, textures: Dataset) -> None:
    before = products(unbroken)
    with pytest.raises(TrainError, match=r"\(different: classifier_epochs\)"):
        train(textures, unbroken, dataclasses.replace(CONFIG, classifier_epochs=7), device="cpu")
    assert products(unbroken) == before
