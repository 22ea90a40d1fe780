"""The validation images of data sets that do not describe a validation split."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import MissingImagesError
from pipeline.training.dataset import Dataset, Sample, load_dataset, samples
from pipeline.training.held_out import training_samples
from pipeline.training.splits import hash_fraction, hash_split
from tests.pipeline.training.tiny_datasets import HEAD, image

GROUP = '[group]\npattern = "^(P[0-9]+)-"\n'


def without_validation(folder: Path, *names: str, group: str = GROUP) -> Dataset:
    """Return a data set of images with these names, which are all training images."""
    for name in names:
        image(folder / "red" / f"{name}.png")
    text = HEAD + '[images]\ntrain = [{ image = "*/*.png" }]\n' + group + '[labels]\nsource = "folders"\n'
    (folder / "dataset.toml").write_text(text.replace("mask_excluded = [4]\n", ""), encoding="utf-8")
    return load_dataset(folder)


def groups_of(chosen: tuple[Sample, ...]) -> set[str]:
    return {one.group for one in chosen}


@pytest.mark.parametrize("grouped", [False, True])
def test_a_data_set_without_a_validation_split_gets_one_by_hash(tmp_path: Path, grouped: bool) -> None:
    names = [f"P{number % 8}-{number:02d}" for number in range(40)]
    dataset = without_validation(tmp_path, *names, group=GROUP if grouped else "")
    training, validation = training_samples(dataset)
    assert sorted([*training, *validation], key=lambda one: one.name) == list(samples(dataset, "train"))
    for chosen, split in ((training, "train"), (validation, "val")):
        for one in chosen:
            assert hash_split(one.group if grouped else one.name, 0.8, 0.2) == split
    assert 0 < len(validation) < len(training)


def test_a_group_is_held_out_even_if_no_hash_lies_beyond_the_limit(tmp_path: Path) -> None:
    hashes = {"P01": 0.1537, "P02": 0.0886, "P03": 0.7874}
    assert {group: round(hash_fraction(group), 4) for group in hashes} == hashes
    names = [f"{group}-{number}" for group in hashes for number in range(10)]
    training, validation = training_samples(without_validation(tmp_path, *names))
    assert (groups_of(training), groups_of(validation)) == ({"P01", "P02"}, {"P03"})
    assert (len(training), len(validation)) == (20, 10)


def test_a_group_is_trained_on_even_if_all_hashes_lie_beyond_the_limit(tmp_path: Path) -> None:
    beyond = sorted((f"P{n}" for n in range(40) if hash_fraction(f"P{n}") >= 0.8), key=hash_fraction)
    assert len(beyond) > 2
    names = [f"{group}-{number}" for group in beyond for number in range(2)]
    training, validation = training_samples(without_validation(tmp_path, *names))
    assert (groups_of(training), groups_of(validation)) == ({beyond[0]}, set(beyond[1:]))


def test_images_of_a_single_group_are_divided_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training, validation = training_samples(without_validation(tmp_path, *(f"P01-{n}" for n in range(40))))
    assert groups_of(training) == groups_of(validation) == {"P01"}
    assert all(hash_split(one.name, 0.8, 0.2) == "val" for one in validation)
    (message,) = caplog.messages
    assert "tiny: all training images belong to the group P01, so images of this group are held out" in message


def test_two_images_are_divided_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training, validation = training_samples(without_validation(tmp_path, "a", "b", group=""))
    assert len(training) == len(validation) == 1
    assert not caplog.messages


def test_a_single_image_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(MissingImagesError, match="because there is only one training image"):
        training_samples(without_validation(tmp_path, "a", group=""))


def test_the_only_group_of_a_class_is_not_held_out(tmp_path: Path) -> None:
    for group in ("P01", "P02", "P03"):  # P03 has the largest hash
        image(tmp_path / "red" / f"{group}-r.png")
    image(tmp_path / "blue" / "P03-b.png")
    training, validation = training_samples(without_validation(tmp_path))
    assert (groups_of(training), groups_of(validation)) == ({"P02", "P03"}, {"P01"})


def test_a_group_is_held_out_even_if_each_has_a_class_of_its_own(tmp_path: Path) -> None:
    image(tmp_path / "red" / "P01-r.png")
    image(tmp_path / "blue" / "P03-b.png")
    training, validation = training_samples(without_validation(tmp_path))
    assert (groups_of(training), groups_of(validation)) == ({"P01"}, {"P03"})
