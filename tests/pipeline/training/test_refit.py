from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from numpy.typing import NDArray
from PIL import Image

from models.bundle import load_bundle
from pipeline.errors import TrainError
from pipeline.training import fit as loop
from pipeline.training.compose import composed
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset, read_rgb, samples
from pipeline.training.train import train
from tests.pipeline.training.single_tissue import write_tiles
from tests.textures import write_textures

CONFIG = TrainConfig(
    weights="none",
    region=64,
    view=128,
    margin=32,
    position_views=4,
    classifier_epochs=2,
    classifier_steps=2,
    classifier_batch=2,
    segmenter_epochs=2,
    segmenter_steps=2,
    segmenter_batch=2,
    confidence=0.0,
    refit=True,
)


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_textures(tmp_path_factory.mktemp("textures"), train=6, val=3, test=2, size=64))


@pytest.fixture(scope="module")
def unbroken(textures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a complete, uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(textures, run, CONFIG, device="cpu")
    return run


def weights(file: Path) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in safetensors.torch.load_file(file).values()]


def header(file: Path) -> list[str]:
    with file.open(newline="") as stream:
        return next(csv.reader(stream))


def test_the_model_is_trained_on_all_images_and_calibrated_without_them(unbroken: Path, textures: Dataset) -> None:
    held_out, final = load_bundle(unbroken / "held-out-bundle"), load_bundle(unbroken / "bundle")
    assert {file.stem for file in (unbroken / "refit" / "pseudo-masks" / "deep").iterdir()} == {
        sample.name for split in ("train", "val") for sample in samples(textures, split)
    }
    for stage in ("classifier", "segmenter"):
        assert weights(unbroken / f"{stage}.safetensors") != weights(unbroken / "refit" / f"{stage}.safetensors")
        # Nothing is validated on images that are trained on.
        assert "val_score" in header(unbroken / f"{stage}.csv")
        assert header(unbroken / "refit" / f"{stage}.csv") == ["epoch", "loss", "data_seconds", "step_seconds"]
    assert held_out.card.weights != final.card.weights
    assert held_out.card.familiarity is not None
    assert final.card.familiarity is not None
    same = {"weights", "familiarity", "training_data"}
    assert held_out.card.model_dump(exclude=same) == final.card.model_dump(exclude=same)
    assert "val_miou" in final.card.metrics
    assert final.card.training_data.startswith(f"{held_out.card.training_data} Then trained again on")


@pytest.mark.full
def test_the_networks_before_are_those_of_a_run_without_refit(
    unbroken: Path, textures: Dataset, tmp_path: Path
) -> None:
    bundle = train(textures, tmp_path / "run", dataclasses.replace(CONFIG, refit=False), device="cpu")
    held_out = load_bundle(unbroken / "held-out-bundle")
    assert bundle.card.model_dump(exclude={"made_with"}) == held_out.card.model_dump(exclude={"made_with"})
    assert not (tmp_path / "run" / "refit").exists()


@pytest.mark.full
@pytest.mark.parametrize("stage", ["classifier", "pseudo masks", "segmenter"])
def test_a_run_killed_in_refit_and_restarted_ends_with_the_same_model(
    unbroken: Path, textures: Dataset, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step

    class Killed(Exception):  # noqa: N818 - not an error of the run's
        pass

    def kill(what: str, step: int, _total: int) -> None:
        if (what, step) == (f"refit: {stage}", 3):
            raise Killed

    with pytest.raises(Killed):
        train(textures, tmp_path / "run", CONFIG, device="cpu", progress=kill)
    assert not (tmp_path / "run" / "bundle").exists()
    train(textures, tmp_path / "run", CONFIG, device="cpu")
    for file in (unbroken / "bundle").iterdir():
        assert (tmp_path / "run" / "bundle" / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_image_name_in_both_splits_is_refused(tmp_path: Path) -> None:
    folder = write_textures(tmp_path / "data", train=2, val=1, test=1, size=64)
    dataset = load_dataset(folder)
    trained, validated = samples(dataset, "train")[0], samples(dataset, "val")[0]
    assert validated.mask is not None
    validated.mask.rename(validated.mask.with_name(trained.image.name))
    validated.image.rename(validated.image.with_name(trained.image.name))
    dataset = load_dataset(folder)
    with pytest.raises(TrainError, match=f"both have an image named .*{trained.name[:3]}.*; rename one, or set refit"):
        train(dataset, tmp_path / "run", CONFIG, device="cpu")
    assert not (tmp_path / "run").exists()


def test_images_are_composed_again_from_both_splits(tmp_path: Path) -> None:
    dataset = write_tiles(tmp_path / "tiles")
    for sample in samples(dataset, "val"):  # the only images with this color
        write(sample.image, (90, 0, 90))
    dataset = load_dataset(tmp_path / "tiles" / "dataset.toml", dataset.root)
    assert dataset.card.compose is not None
    many = dataset.card.compose.model_copy(update={"train": 8})
    dataset = Dataset(dataset.card.model_copy(update={"compose": many}), dataset.root)
    before = composed(dataset, tmp_path)
    made = composed(dataset, tmp_path, with_validation=True)
    assert made.root != before.root
    assert [folder.name for folder in made.root.iterdir()] == ["train"]
    assert len(samples(made, "train")) == len(samples(before, "train")) == 8
    assert not any(has_purple(one) for one in map(read_rgb, samples(before, "train")))
    assert any(has_purple(one) for one in map(read_rgb, samples(made, "train")))


def write(file: Path, color: tuple[int, int, int]) -> None:
    with Image.open(file) as image:
        size = image.size
    Image.new("RGB", size, color).save(file)


def has_purple(rgb_HWC: NDArray[np.uint8]) -> bool:
    red_HW, green_HW, blue_HW = (rgb_HWC[..., channel].astype(int) for channel in range(3))
    return bool(((red_HW > green_HW + 40) & (blue_HW > green_HW + 40)).mean() > 0.02)
