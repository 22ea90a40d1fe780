"""The shipped descriptions of published data sets."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.training import dataset_card
from pipeline.training.compose import composed
from pipeline.training.dataset import (
    IGNORED,
    labeled_boxes,
    load_dataset,
    read_mask,
    samples,
    shipped_names,
)
from pipeline.training.dataset_sections import SPLITS, BackgroundRule, Split
from pipeline.training.pieces import pieces_of
from pipeline.training.splits import hash_split
from pipeline.training.taught_classes import check_classes
from tests.pipeline.training.tiny_datasets import image, mask, plain
from tests.repository import REPOSITORY


@pytest.mark.parametrize(
    ("case", "split"),
    [
        ("GT2016770", "train"),
        ("GTxc2012962", "train"),
        ("GT2013923", "val"),
        ("GTXC2015426", "val"),
        ("GT2014665", "test"),
        ("GT2013123", "test"),
    ],
)
def test_the_hash_split_still_equals_the_split_of_the_shipped_bundle(case: str, split: Split) -> None:
    """These are the cases nearest to the limits when the shipped bundle was first trained."""
    assert hash_split(case, 0.70, 0.15) == split


@pytest.mark.parametrize(
    ("name", "train", "val", "suffix"),
    [
        ("luad-histoseg", "train", "val", "-[1 0 0 1]"),
        ("luad-histoseg", "training", "valid", "-[1 0 0 1]"),
        ("bcss-wsss", "train/img", "val", "_MPP-0.2500+0[1001]"),
        ("bcss-wsss", "training", "valid", "_MPP-0.2500+0[1001]"),
    ],
)
def test_published_layouts_are_read_unchanged(tmp_path: Path, name: str, train: str, val: str, suffix: str) -> None:
    image(tmp_path / train / f"x{suffix}.png")
    for folder in (val, "test"):
        image(tmp_path / folder / "img" / "y.png")
        values_HW = plain(4)
        values_HW[2] = 3
        mask(tmp_path / folder / "mask" / "y.png", values_HW)
    dataset = load_dataset(name, tmp_path)

    assert samples(dataset, "train")[0].labels_K == (True, False, False, True)
    for split in SPLITS[1:]:
        (sample,) = samples(dataset, split)
        labels_HW = read_mask(dataset, sample)
        assert (labels_HW[2, 0], labels_HW[0, 0]) == (3, IGNORED)
        assert labeled_boxes(dataset, sample).present_BK.tolist() == [[False, False, False, True]]
    assert (dataset.card.background is None) == (name == "bcss-wsss")


def test_shipped_palettes_equal_the_published_ones() -> None:
    cards = {
        name: dataset_card.read_card(REPOSITORY / "pipeline" / "training" / "datasets" / f"{name}.toml")
        for name in shipped_names()
    }

    assert set(cards) == {"luad-histoseg", "bcss-wsss", "glas", "ebhi-seg", "kather-2016", "colorectal", "colon-gland"}
    luad, bcss = cards["luad-histoseg"], cards["bcss-wsss"]
    assert [spec.color for spec in luad.classes] == [(205, 51, 51), (0, 255, 0), (65, 105, 225), (255, 165, 0)]
    assert [spec.color for spec in bcss.classes] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255)]
    assert luad.background == BackgroundRule(gray_above=200, smallest_px=50)
    for card in (luad, bcss):
        assert [spec.mask_values for spec in card.classes] == [(0,), (1,), (2,), (3,)]
        assert card.mask_excluded == (4,)


def shared_data(name: str) -> Path:
    shared = Path(os.environ.get("WSI_SEGMENT_SHARED", REPOSITORY.parent / "shared"))
    folder = shared / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no shared data set {name}: put it beside the checkout in shared/data, or set WSI_SEGMENT_SHARED")
    return folder


@pytest.mark.shared
def test_glas_is_split_as_published_with_whole_training_patients_held_out() -> None:
    root = shared_data("glas")
    dataset = load_dataset("glas", root)
    train, val, test = (samples(dataset, split) for split in SPLITS)

    assert (len(train) + len(val), len(test)) == (85, 80)
    assert all(sample.name.startswith("train_") for sample in (*train, *val))
    assert all(sample.name.startswith("test") for sample in test)
    assert not {sample.group for sample in train} & {sample.group for sample in val}
    with (root / "meta.csv").open(newline="") as stream:
        grade = {row["name"]: row["grade"] for row in csv.DictReader(stream)}
    grades = [grade[sample.name] for sample in val]
    assert 0.15 <= len(val) / 85 <= 0.20
    assert (grades.count("benign"), grades.count("malignant")) == (6, 8)


@pytest.mark.shared
def test_glas_crops_have_the_presence_of_their_masks() -> None:
    dataset = load_dataset("glas", shared_data("glas"))
    counts_K = np.zeros(2, dtype=int)
    expected_K = np.zeros(2, dtype=int)
    for sample in samples(dataset, "val"):
        labeled = labeled_boxes(dataset, sample)
        counts_K += labeled.present_BK.sum(axis=0)
        assert sample.mask is not None
        with Image.open(sample.mask) as stored:
            gland_HW = np.asarray(stored) > 0
        for x, y, w, h in labeled.boxes_B4:
            share = gland_HW[y : y + h, x : x + w].mean()
            expected_K += [1 - share > 0.05, share > 0.05]
    assert counts_K.tolist() == expected_K.tolist()
    check_classes(dataset, [labeled_boxes(dataset, sample).present_BK for sample in samples(dataset, "val")])


@pytest.mark.shared
def test_ebhi_seg_is_split_by_case_as_the_model_card_says() -> None:
    dataset = load_dataset("ebhi-seg", shared_data("ebhi-seg"))
    train, val, test = (samples(dataset, split) for split in SPLITS)

    assert (len(train), len(val), len(test)) == (1245, 254, 277)
    cases = [{sample.group for sample in chosen} for chosen in (train, val, test)]
    assert len(set.union(*cases)) == sum(map(len, cases)) == 288
    labeled = [labeled_boxes(dataset, sample) for sample in test[:20]]
    assert all(one.boxes_B4.shape == (36, 4) for one in labeled)
    assert all(one.boxes_B4[:, 2:].tolist() == [[64, 64]] * 36 for one in labeled)
    assert all(one.present_BK.any(axis=1).all() for one in labeled)


@pytest.mark.shared
def test_colorectal_adds_windows_of_validation_cases_to_the_validation_slide() -> None:
    shared_data("ebhi-seg")
    dataset = load_dataset("colorectal", shared_data("kather2016"))
    found = pieces_of(dataset, "val")
    cut = {kind: sum(piece.slide.startswith("ebhi-seg ") for piece in own) for kind, own in found.items()}
    assert {kind: count for kind, count in cut.items() if count} == {
        ("tumor",): 411,
        ("mucosa",): 57,
        ("stroma", "immune"): 164,
    }
    assert {piece.slide for own in found.values() for piece in own} == {"05", *(f"ebhi-seg {n}" for n in range(3))}


@pytest.mark.full
@pytest.mark.shared
def test_colon_gland_has_all_images_of_ebhi_seg_beside_the_composed_ones(tmp_path: Path) -> None:
    root = shared_data("ebhi-seg")
    made = composed(load_dataset("colon-gland", shared_data("kather2016")), tmp_path, ("val",))
    names = {sample.name for sample in samples(made, "val")}
    whole = {f"ebhi-seg-{sample.group}+{sample.name}" for sample in samples(load_dataset("ebhi-seg", root), "val")}
    assert len(names) == 294
    assert names - whole == {f"val-{n:04d}" for n in range(40)}
    composed_pixels = np.concatenate(
        [read_mask(made, sample).ravel() for sample in samples(made, "val") if sample.name not in whole]
    )
    assert 0.4 < (composed_pixels == 1).mean() < 0.6
