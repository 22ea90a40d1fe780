from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.bundle import load_bundle
from models.predictor import Predictor
from pipeline.evaluate import confusion_matrix, evaluate, scores
from pipeline.patches import PatchDataError, Patches, augment, load_patches, presence, random_crops, split_of, subset
from pipeline.train import TrainConfig, TrainError, calibrate_gate, layered_loss, train
from tests.models.networks import NO_DIGEST, ColorClassifier, ColorSegmenter, make_card


def slow_scores(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Definitions over the kept pixels, one by one."""
    pairs = [(t, p) for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True) if t < classes]
    iou = []
    for k in range(classes):
        union = sum(t == k or p == k for t, p in pairs)
        iou.append(sum(t == k and p == k for t, p in pairs) / union if union else float("nan"))
    shares = [sum(t == k for t, _ in pairs) / len(pairs) for k in range(classes)]
    return {
        "miou": float(np.nanmean(iou)),
        "fwiou": sum(share * value for share, value in zip(shares, iou, strict=True) if share > 0),
        "accuracy": sum(t == p for t, p in pairs) / len(pairs),
    } | {f"iou_{k}": value for k, value in enumerate(iou)}


@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 255], (3, 9, 7)).astype(np.uint8)
    predicted = rng.integers(0, 4, (3, 9, 7)).astype(np.uint8)
    actual = scores(confusion_matrix(truth, predicted, 3), ("0", "1", "2"))
    expected = slow_scores(truth, predicted, 3)
    assert actual == pytest.approx(expected)


def test_absent_class_is_left_out_of_the_mean() -> None:
    same = np.zeros((1, 4, 4), dtype=np.uint8)
    assert scores(confusion_matrix(same, same, 2), ("a", "b"))["miou"] == 1.0


def test_class_is_present_above_five_percent() -> None:
    masks_NHW = np.zeros((2, 10, 10), dtype=np.uint8)
    masks_NHW[0].flat[:5] = 1
    masks_NHW[1].flat[:6] = 1
    assert presence(masks_NHW, 2).tolist() == [[True, False], [True, True]]


def test_cases_split_about_70_15_15_and_always_the_same_way() -> None:
    splits = [split_of(f"case-{n}") for n in range(2000)]
    shares = [splits.count(name) / 2000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.03)
    assert [split_of(case) for case in ("GT2012221", "GT2013112")] == [split_of("GT2012221"), split_of("GT2013112")]


def test_labels_move_with_their_image() -> None:
    rng = np.random.default_rng(0)
    masks_NHW = rng.integers(0, 2, (8, 16, 16)).astype(np.uint8)
    rgb_NHWC = np.repeat(masks_NHW[..., None] * 160 + 40, 3, axis=3).astype(np.uint8)
    moved_NHWC, labels_NLHW = augment(rgb_NHWC, masks_NHW[:, None], rng)
    assert labels_NLHW is not None
    assert np.array_equal(moved_NHWC[..., 0] > 110, labels_NLHW[:, 0] == 1)
    assert not np.array_equal(labels_NLHW[:, 0], masks_NHW)


def test_crops_come_with_their_own_masks() -> None:
    masks_NHW = np.random.default_rng(0).integers(0, 2, (3, 32, 32)).astype(np.uint8)
    patches = Patches(("a", "b", "c"), np.repeat(masks_NHW[..., None] * 255, 3, axis=3).astype(np.uint8), masks_NHW)
    rgb_NHWC, crops_NHW = random_crops(patches, 20, 8, np.random.default_rng(1))
    assert rgb_NHWC.shape == (20, 8, 8, 3)
    assert np.array_equal(rgb_NHWC[..., 0] == 255, crops_NHW == 1)
    assert subset(patches, 2, np.random.default_rng(0)).names in {("a", "b"), ("a", "c"), ("b", "c")}


def test_thresholds_keep_the_recall_asked_for() -> None:
    rng = np.random.default_rng(2)
    presence_NK = rng.uniform(0, 0.2, (500, 2)).astype(np.float32)
    labels_NK = rng.uniform(size=(500, 2)) < 5 * presence_NK
    thresholds = calibrate_gate(presence_NK, labels_NK, 0.9)
    for k in range(2):
        held = presence_NK[labels_NK[:, k], k]
        assert 0.9 <= (held > thresholds[k]).mean() < 0.92


def test_no_threshold_is_above_the_default_and_a_class_that_no_tile_holds_gets_it() -> None:
    labels_NK = np.array([[True, False]] * 4)
    assert calibrate_gate(np.full((4, 2), 0.9, dtype=np.float32), labels_NK, 0.99) == (0.1, 0.1)
    assert calibrate_gate(np.full((4, 2), 0.05, dtype=np.float32), labels_NK, 0.99) == (0.0499, 0.1)


def test_loss_is_the_weighted_sum_over_layers() -> None:
    logits_NKhw = torch.randn(2, 3, 4, 4)
    labels_NLHW = torch.randint(0, 3, (2, 3, 4, 4)).repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    each = [
        torch.nn.functional.cross_entropy(logits_NKhw, labels_NLHW[:, layer, ::4, ::4].long()) for layer in range(3)
    ]
    assert layered_loss(logits_NKhw, labels_NLHW, (0.2, 0.2, 0.6)).item() == pytest.approx(
        0.2 * each[0].item() + 0.2 * each[1].item() + 0.6 * each[2].item(), rel=1e-5
    )


def test_missing_table_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(PatchDataError, match=r"no meta\.csv"):
        load_patches(tmp_path, "train")


def _write_data(folder: Path, count: int = 16) -> None:
    """Patches of 64 px: green squares (gland) on orange ground (other)."""
    (folder / "img").mkdir(parents=True)
    (folder / "mask").mkdir()
    rng = np.random.default_rng(4)
    with (folder / "meta.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "case"])
        for n in range(count):
            mask_HW = np.zeros((64, 64), dtype=np.uint8)
            x, y = rng.integers(0, 32, 2)
            mask_HW[y : y + 32, x : x + 32] = 255
            rgb_HWC = np.where(mask_HW[..., None] > 0, (0, 158, 115), (230, 159, 0)).astype(np.uint8)
            Image.fromarray(rgb_HWC).save(folder / "img" / f"p{n}.webp", lossless=True)
            Image.fromarray(mask_HW).save(folder / "mask" / f"p{n}.png")
            writer.writerow([f"p{n}", f"case{n}"])


@pytest.mark.slow
def test_run_leaves_a_bundle_that_loads_and_a_second_run_redoes_nothing(tmp_path: Path) -> None:
    _write_data(tmp_path / "data")
    config = TrainConfig(
        name="tiny",
        imagenet=False,
        crops=((32, 2),),
        classifier_epochs=1,
        classifier_steps=2,
        segmenter_steps=2,
        segmenter_batch=2,
    )
    folder = train(tmp_path / "data", tmp_path / "run", config)
    bundle = load_bundle(folder)
    assert 0 <= bundle.card.metrics["test_miou"] <= 1
    products = {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "run").rglob("*.*")) if file.is_file()}
    products.pop(tmp_path / "run" / "config.json")
    assert train(tmp_path / "data", tmp_path / "run", config) == folder
    assert all(file.stat().st_mtime_ns == before for file, before in products.items())
    with pytest.raises(TrainError, match="another configuration"):
        train(tmp_path / "data", tmp_path / "run", TrainConfig(name="other"))


def test_evaluation_of_a_perfect_model_is_one(tmp_path: Path) -> None:

    _write_data(tmp_path / "data")
    patches = load_patches(tmp_path / "data", "train")
    colors = ((230, 159, 0), (0, 158, 115))
    networks = ColorClassifier(colors), ColorSegmenter(colors)
    predictor = Predictor(make_card(colors), NO_DIGEST, *networks, device="cpu", output_stride=1)
    result = evaluate(predictor, patches)
    assert result["miou"] > 0.85
    assert result["single_class_tiles"] == 0.0
