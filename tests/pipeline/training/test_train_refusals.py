"""What wsi-train refuses before it trains: settings, patches, classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from models.errors import ArchitectureError
from pipeline.errors import EmptyClassError, MissingImagesError, TrainConfigError, TrainError
from pipeline.training.dataset import Dataset, load_dataset, samples
from pipeline.training.prepare import prepare
from pipeline.training.train import train
from tests.pipeline.training.short_run import CONFIG, Killed
from tests.textures import write_crops, write_textures


def test_a_data_set_without_a_test_split_cannot_be_tested(tmp_path: Path) -> None:
    dataset = load_dataset(write_crops(tmp_path / "data", {"a": (40, 40)}, side=40, stride=40))
    with pytest.raises(MissingImagesError, match="does not describe split test, only train, val"):
        train(dataset, tmp_path / "run", dataclasses.replace(CONFIG, region=None), device="cpu", test=True)
    assert not (tmp_path / "run").exists()


def test_head_epochs_need_a_shared_backbone(textures: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, head_epochs=2)
    with pytest.raises(TrainConfigError, match="head_epochs is 2, which has no effect without shared_backbone"):
        train(textures, tmp_path / "run", config, device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_regions_of_the_last_stage_must_hold_a_patch_too(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=2, val=1, test=1, size=128))
    config = dataclasses.replace(CONFIG, classifier_mpp=(2.0,), shared_backbone=True)
    prepare(dataset, config)
    with pytest.raises(TrainError, match=r"region is 64 px, but the labeled patches are 128 px at 1 .*coarser mpp"):
        prepare(dataset, dataclasses.replace(config, head_epochs=1))


def test_a_name_that_is_not_valid_in_a_card_is_refused_before_training(textures: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"name is not valid in a model card"):
        train(textures, tmp_path / "run", dataclasses.replace(CONFIG, name="My model"), device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_error_for_a_small_region_suggests_a_value_and_leaves_the_folder_unused(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=4, val=1, test=1, size=100))
    with pytest.raises(TrainError, match=r"is 64 px, but the labeled patches are 100 px at 1 .*to 128 or"):
        train(dataset, tmp_path / "run", CONFIG, device="cpu")
    tiny = dataclasses.replace(CONFIG, classifier_mpp=(1.7, 20.0))
    with pytest.raises(TrainError, match=r"are 5 px at 20 µm/px; the classifier needs at least 8 px, so set a finer"):
        train(dataset, tmp_path / "run", tiny, device="cpu")
    finer = dataclasses.replace(CONFIG, region=128, classifier_mpp=(1.0, 0.5))
    with pytest.raises(TrainError, match=r"is 128 px, but the labeled patches are 200 px at 0\.5 .*to 224 or"):
        train(dataset, tmp_path / "run", finer, device="cpu")

    def kill(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(dataset, tmp_path / "run", dataclasses.replace(CONFIG, region=128), device="cpu", progress=kill)


@pytest.mark.parametrize(("mpp", "classifier_mpp"), [(1.0, (2.0,)), (2.0, (1.0,)), (2.0, (2.0, 1.0))])
def test_the_patches_must_have_one_size_at_every_pixel_size(
    tmp_path: Path, mpp: float, classifier_mpp: tuple[float, ...]
) -> None:
    file = write_textures(tmp_path / "data", train=4, val=1, test=1, size=60)
    image = min((tmp_path / "data" / "train").iterdir())
    # 60 and 61 px are both 30 px at twice the pixel size.
    with Image.open(image) as picture:
        larger = picture.resize((61, 61))
    larger.save(image)
    config = dataclasses.replace(CONFIG, mpp=mpp, classifier_mpp=classifier_mpp)
    with pytest.raises(TrainError, match="the labeled patches have 2 sizes"):
        train(load_dataset(file), tmp_path / "run", config, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"backbone": "resnet19"}, {"encoder": "resnet19"}])
def test_an_unknown_network_is_refused_before_anything_is_written(
    textures: Dataset, tmp_path: Path, wrong: dict[str, str]
) -> None:
    (name,) = wrong.values()
    with pytest.raises(ArchitectureError, match=name):
        train(textures, tmp_path / "run", dataclasses.replace(CONFIG, **wrong), device="cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_labeled_patches_that_are_not_square_are_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=4, val=1, test=1, size=64))
    for sample in samples(dataset, "train"):
        with Image.open(sample.image) as image:
            image.crop((0, 0, 64, 48)).save(sample.image)
    with pytest.raises(TrainError, match=r"textures: the labeled patches are 64x48 px, but quarter turns need squares"):
        train(dataset, tmp_path / "run", dataclasses.replace(CONFIG, region=None), device="cpu")


def test_labeled_patches_of_several_sizes_are_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=4, val=1, test=1, size=64))
    file = samples(dataset, "train")[2].image
    with Image.open(file) as image:
        image.crop((0, 0, 50, 60)).save(file)
    with pytest.raises(TrainError, match=r"the labeled patches have 2 sizes, such as \(50, 60\) and \(64, 64"):
        train(dataset, tmp_path / "run", CONFIG, device="cpu")


def test_the_error_names_a_class_without_training_patches(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=4, val=1, test=1, size=64))
    for sample in samples(dataset, "train"):
        sample.image.rename(sample.image.with_name(f"{sample.name.split('-')[0]}-[1 1 0].png"))
    with pytest.raises(EmptyClassError, match="plain"):
        train(dataset, tmp_path / "run", CONFIG, device="cpu")
