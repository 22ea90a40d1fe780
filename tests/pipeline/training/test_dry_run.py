from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UnreadableImageError
from pipeline.training import dry_run as module
from pipeline.training.changes import CHANGES
from pipeline.training.classifier import steps_per_epoch
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import load_dataset
from pipeline.training.dry_run import class_counts, dry_run
from pipeline.training.fit import Task
from pipeline.training.held_out import training_samples
from pipeline.training.prepare import prepare
from tests.pipeline.training.cells import crop_images
from tests.pipeline.training.single_tissue import TOML, with_whole_images, write_tiles
from tests.textures import write_textures

CONFIG = TrainConfig(
    weights="none",
    region=64,
    view=96,
    margin=32,
    classifier_epochs=3,
    classifier_batch=2,
    segmenter_epochs=2,
    segmenter_steps=7,
    segmenter_batch=2,
)


def test_a_plan_has_counts_steps_and_times_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dataset = load_dataset(write_textures(tmp_path / "data", train=6, val=2, test=1, size=64))
    before = sorted(tmp_path.rglob("*"))
    timed: list[Task] = []

    def two_seconds(task: Task, *_: object) -> float:
        timed.append(task)
        return 2.0

    monkeypatch.setattr(module, "time_steps", two_seconds)
    plan = dry_run(dataset, CONFIG, "cpu")
    assert [task.name for task in timed] == ["classifier", "segmenter"]
    assert plan["images"] == {"train": 6, "val": 2}
    assert plan["settings"] == dataclasses.asdict(dataclasses.replace(CONFIG, mpp=1.0))
    classifier, segmenter = plan["stages"]["classifier"], plan["stages"]["segmenter"]
    # Six images of 64 px in batches of two regions of 64 px.
    assert (classifier["epochs"], classifier["steps_per_epoch"]) == (3, 3)
    assert (segmenter["epochs"], segmenter["steps_per_epoch"]) == (2, 7)
    for stage in (classifier, segmenter):
        seconds = stage["epochs"] * (stage["steps_per_epoch"] * 2.0 + stage["validation_seconds"])
        assert stage["minutes"] == pytest.approx(seconds / 60, abs=0.01)
    assert plan["minutes"] == pytest.approx(sum(stage["minutes"] for stage in plan["stages"].values()), abs=0.1)
    # Six training images as they are, in three other colors and in each of the changes; two validation images.
    assert plan["stages"]["finish"]["images"] == 6 * (4 + len(CHANGES)) + 2
    assert plan["stages"]["finish"]["views"] == 0  # a view of 96 px has a single ring beyond the margin
    assert "pseudo masks" not in caplog.text  # their shares would be invented
    assert 0.05 < plan["memory_gb"] < 100
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("validates", [True, False])
def test_a_plan_counts_the_images_and_steps_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, validates: bool
) -> None:
    dataset = with_whole_images(tmp_path) if validates else load_dataset(without_validation(tmp_path))
    made = composed(dataset, tmp_path / "made", ("train", "val") if validates else ("train",))
    training, validation = training_samples(made)
    parts = prepare(made, CONFIG)
    monkeypatch.setattr(module, "time_steps", lambda *_: 2.0)
    monkeypatch.setattr(module, "COMPOSED", 2 if validates else 12)
    plan = dry_run(dataset, CONFIG, "cpu")
    assert plan["images"] == {"train": len(training), "val": len(validation)}
    assert plan["stages"]["pseudo masks"]["images"] == len(training)
    expected = steps_per_epoch(parts.by_size, CONFIG.region, CONFIG.classifier_batch)
    assert plan["stages"]["classifier"]["steps_per_epoch"] == expected


def without_validation(folder: Path) -> Path:
    """Write tiles of a data set without a validation split, of which 40 images are composed; return its folder."""
    write_tiles(folder)
    text = TOML.replace('train = ["1", "2"]\nval = ["3"]', 'train = ["1", "2", "3"]\nval = []').replace(
        "train = 3", "train = 40"
    )
    (folder / "dataset.toml").write_text(text)
    return folder


def test_a_plan_has_the_stage_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=6, val=2, test=1, size=64))
    monkeypatch.setattr(module, "time_steps", lambda *_: 2.0)
    config = dataclasses.replace(CONFIG, shared_backbone=True, head_epochs=5)
    plan = dry_run(dataset, config, "cpu")
    assert list(plan["stages"]) == ["classifier", "pseudo masks", "segmenter", "head", "finish"]
    assert (plan["stages"]["head"]["epochs"], plan["stages"]["head"]["steps_per_epoch"]) == (5, 3)


def test_the_last_stage_counts_views_images_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=6, val=2, test=1, size=64))
    monkeypatch.setattr(module, "time_steps", lambda *_: 2.0)
    monkeypatch.setattr(module, "_seconds", lambda _: 6.0)
    plan = dry_run(dataset, dataclasses.replace(CONFIG, view=160, position_views=10), "cpu")
    finish, images = plan["stages"]["finish"], 6 * (4 + len(CHANGES)) + 2
    assert (finish["views"], finish["images"]) == (10, images)
    held = [plan["stages"][name]["validation_seconds"] for name in ("classifier", "segmenter")]
    # The textures have masks. A call predicts the two views of a batch.
    assert finish["minutes"] == pytest.approx((10 * 6 / 2 + images * 6 + 2 * sum(held)) / 60, abs=0.02)


@pytest.mark.parametrize(("masks", "minutes"), [(True, 2 * 10 + 2 * 100), (False, 2 * 10 + 100)])
def test_the_last_stage_measures_the_temperature_only_with_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, masks: bool, minutes: int
) -> None:
    file = write_textures(tmp_path, train=12, val=2, test=1, size=64)
    if not masks:  # some of the training images are held out
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith(("val =", "test ="))))
    seconds = {"classifier": 600.0, "pseudo masks": 0.0, "segmenter": 6000.0}
    stages = {name: {"validation_seconds": value, "minutes": 0.0} for name, value in seconds.items()}
    monkeypatch.setattr(module, "_stages", lambda *_: stages)
    monkeypatch.setattr(module, "_seconds", lambda _: 0.0)
    plan = dry_run(load_dataset(file), CONFIG, "cpu")
    assert plan["stages"]["finish"]["minutes"] == minutes


def test_the_counts_are_those_of_labeled_patches(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 32)}, side=32, stride=32)
    images.present = [np.array([[True, True, False], [False, True, False]])]
    assert class_counts(images) == {"patches": 2, "classes": {"red": 1, "blue": 2, "orange": 0}}


def test_an_image_of_another_data_set_that_a_run_would_skip_does_not_end_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(write_textures(tmp_path, train=3, val=1, test=1, size=64))
    first, second, _ = training_samples(dataset)[0]
    first.image.write_bytes(first.image.read_bytes()[:40])
    with pytest.raises(UnreadableImageError, match="cannot be read"):  # a third, more than a run skips
        module._first_image(dataset, dataset.mpp)[0].rgb(0)
    monkeypatch.setattr(module, "UNREADABLE_SHARE", 0.4)
    images, counts = module._first_image(dataset, dataset.mpp)
    assert ([sample.name for sample in images.samples], counts) == ([second.name], (3, 1))
    assert images.rgb(0).shape[2] == 3
