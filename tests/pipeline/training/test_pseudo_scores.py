from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.training import pseudo_scores as module
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import IGNORED, load_dataset, samples
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_scores import pseudo_scores, write_pseudo_scores
from tests.pipeline.training.cells import CellClassifier, crop_images
from tests.textures import write_textures

CPU = torch.device("cpu")


def with_masks(monkeypatch: pytest.MonkeyPatch, masks_LHW: NDArray[np.uint8]) -> None:
    monkeypatch.setattr(module, "pseudo_masks_of_image", lambda *_: masks_LHW)


def test_the_truth_gives_perfect_scores_and_ignored_pixels_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = crop_images(tmp_path, {"a": (48, 32)})
    masks_LHW = images.truth(0)[None].copy()
    assert masks_LHW[0, 0].tolist() == [0] * 16 + [1] * 16 + [2] * 16
    masks_LHW[0, :8] = IGNORED
    with_masks(monkeypatch, masks_LHW)
    (row,) = pseudo_scores(CellClassifier("gap"), images, TrainConfig(), CPU)
    assert row == {
        "layer": "deep", "miou": 1.0, "fwiou": 1.0, "accuracy": 1.0, "ignored": 0.25,
        "iou_red": 1.0, "iou_blue": 1.0, "iou_orange": 1.0,
    }  # fmt: skip


def test_each_layer_is_scored_over_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = crop_images(tmp_path, {"a": (48, 32), "b": (48, 32)})
    wrong_HW = images.truth(0).copy()
    wrong_HW[:, :4] = 1  # a quarter of red becomes blue
    with_masks(monkeypatch, np.stack([wrong_HW, images.truth(0)]))
    first, second = pseudo_scores(CellClassifier("gap"), images, TrainConfig(layer_weights=(0.5, 0.0, 0.5)), CPU)
    assert (first["layer"], second["layer"]) == ("shallow", "deep")
    assert (first["iou_red"], first["iou_blue"], first["iou_orange"]) == (0.75, 0.8, 1.0)
    assert (first["miou"], first["accuracy"], second["miou"]) == (0.85, round(11 / 12, 4), 1.0)


def test_the_scores_of_a_run_are_written_once(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (48, 32)})
    file, classifier, config = tmp_path / "pseudo-masks.csv", CellClassifier("gap"), TrainConfig(confidence=0.0)
    write_pseudo_scores(file, classifier, images, config, CPU)
    with file.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    (expected,) = pseudo_scores(classifier, images, config, CPU)
    assert row == {name: str(value) for name, value in expected.items()}
    file.write_text("kept")
    write_pseudo_scores(file, classifier, images, config, CPU)
    assert file.read_text() == "kept"


def test_images_without_masks_are_not_scored(tmp_path: Path) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=2, val=1, test=1, size=32))
    images = PatchImages(dataset, samples(dataset, "train"), dataset.mpp)
    write_pseudo_scores(tmp_path / "pseudo-masks.csv", CellClassifier("gap"), images, TrainConfig(), CPU)
    assert not (tmp_path / "pseudo-masks.csv").exists()


def test_a_mask_has_the_pixel_size_of_the_model(tmp_path: Path) -> None:
    dataset = crop_images(tmp_path, {"a": (48, 32)}).dataset
    images = PatchImages(dataset, samples(dataset, "train"), 2 * dataset.mpp)
    assert images.truth(0).shape == images.rgb(0).shape[:2] == (16, 24)
    assert images.truth(0)[0].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    Image.fromarray(images.truth(0))
