from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]
from torch import Tensor, nn

from models.classifier import Classifier
from models.heads import HEADS, HeadOutput
from pipeline.training.classifier import (
    ClassifierBatch,
    build_classifier,
    class_weights,
    classifier_task,
    head_task,
    held_out_batches,
    keep_statistics,
    mean_average_precision,
    patch_outputs,
    presence_loss,
    presence_scores,
    steps_per_epoch,
)
from pipeline.training.config import TrainConfig
from pipeline.training.fit import Processes, fit
from pipeline.training.inputs import as_input
from pipeline.training.patches import View, at_pixel_sizes
from tests.pipeline.training.cells import CellClassifier, crop_images, noise_images

CPU = torch.device("cpu")
ALONE = Processes(0, 1)


@pytest.mark.parametrize("head", ["gap", "area", "pcam"])
def test_a_box_gets_the_head_output_of_its_nearest_cells(head: str) -> None:
    classifier = CellClassifier(head)
    x_NCHW = as_input(noise_images(2, 64, 96), CPU, TrainConfig())
    boxes = [np.array([(0, 0, 31, 26), (13, 21, 31, 26), (65, 38, 31, 26)]), np.array([(43, 11, 31, 26)])]
    output = patch_outputs(classifier, x_NCHW, boxes)
    deep_NChw = classifier.stages(x_NCHW).deep
    logits, maps = [], []
    for n, boxes_B4 in enumerate(boxes):
        for x, y, _, _ in boxes_B4.tolist():
            # 31 x 26 px are 4 x 3 cells. Cells start at multiples of 8.
            left, top = min(round(x / 8), 12 - 4), min(round(y / 8), 8 - 3)
            window_1Chw = deep_NChw[n : n + 1, :, top : top + 3, left : left + 4]
            one = classifier.head(window_1Chw, x_NCHW[n : n + 1])
            logits.append(one.logits_NK)
            maps.append(one.map_NKhw)
    torch.testing.assert_close(output.logits_NK, torch.cat(logits))
    torch.testing.assert_close(output.map_NKhw, torch.cat(maps))


@pytest.mark.parametrize("head", list(HEADS))
def test_a_box_on_whole_cells_depends_only_on_its_pixels(head: str) -> None:
    classifier = CellClassifier(head)
    rgb_NHWC = noise_images(2, 48, 64)
    boxes = [np.array([(0, 16, 32, 24), (32, 24, 32, 24)]), np.array([(16, 8, 32, 24)])]
    crops_NHWC = np.stack([rgb_NHWC[n, y : y + h, x : x + w] for n, b in enumerate(boxes) for x, y, w, h in b.tolist()])
    expected = classifier(as_input(crops_NHWC, CPU, TrainConfig()))
    found = patch_outputs(classifier, as_input(rgb_NHWC, CPU, TrainConfig()), boxes)
    torch.testing.assert_close(found.logits_NK, expected)


@pytest.mark.parametrize("head", ["gap", "area"])
def test_boxes_of_whole_images_get_the_output_of_the_plain_classifier(head: str) -> None:
    torch.manual_seed(1)
    classifier = Classifier("tf_efficientnet_lite0", head, 3).eval()
    x_NCHW = as_input(noise_images(2, 40, 56), CPU, TrainConfig())
    whole = [np.array([(0, 0, 56, 40)])] * 2
    with torch.inference_mode():
        found: HeadOutput = patch_outputs(classifier, x_NCHW, whole)
        assert torch.equal(found.logits_NK, classifier(x_NCHW))


def test_overlapping_boxes_have_the_same_gradient_as_slices() -> None:
    classifier = CellClassifier("gap")
    x_NCHW = as_input(noise_images(1, 32, 32), CPU, TrainConfig())
    boxes = np.array([(0, 0, 16, 16), (8, 8, 16, 16), (16, 16, 16, 16)])
    weight = classifier.backbone.net[0].weight
    (found,) = torch.autograd.grad(patch_outputs(classifier, x_NCHW, [boxes]).logits_NK.square().sum(), weight)
    deep_NChw = classifier.stages(x_NCHW).deep
    sliced = [deep_NChw[:, :, y // 8 : y // 8 + 2, x // 8 : x // 8 + 2] for x, y, _, _ in boxes.tolist()]
    logits = torch.cat([classifier.head(window, x_NCHW).logits_NK for window in sliced])
    (expected,) = torch.autograd.grad(logits.square().sum(), weight)
    torch.testing.assert_close(found, expected)


def test_balanced_weights_give_presence_and_absence_the_same_total_weight() -> None:
    present_MK = np.random.default_rng(0).random((200, 4)) < (0.1, 0.3, 0.5, 0.94)
    weight_2K = class_weights(present_MK.mean(axis=0), balance=True).numpy()
    weight_MK = np.where(present_MK, weight_2K[1], weight_2K[0])
    for k in range(4):
        present, absent = weight_MK[present_MK[:, k], k].sum(), weight_MK[~present_MK[:, k], k].sum()
        assert present == pytest.approx(absent, rel=1e-5)
    assert weight_MK.mean() == pytest.approx(1.0, rel=1e-5)


def test_no_label_weighs_more_than_ten_and_unbalanced_labels_weigh_one() -> None:
    frequency_K = np.array([0.001, 0.999, 0.0, 1.0])
    weight_2K = class_weights(frequency_K, balance=True)
    assert weight_2K.dtype == torch.float32
    assert weight_2K[1].tolist() == pytest.approx([10.0, 0.5 / 0.999, 10.0, 0.5])
    assert weight_2K[0].tolist() == pytest.approx([0.5 / 0.999, 10.0, 0.5, 10.0])
    assert class_weights(frequency_K, balance=False).tolist() == [[1.0] * 4] * 2


def made_batch(weight_2K: Tensor, seed: int = 0) -> ClassifierBatch:
    rng = np.random.default_rng(seed)
    boxes = [np.array([(0, 0, 32, 32), (16, 8, 32, 32)]), np.array([(32, 32, 32, 32)]), np.zeros((0, 4), np.int64)]
    views = [
        View(rgb_HWC, boxes_B4, rng.random((len(boxes_B4), 3)) < 0.5)
        for rgb_HWC, boxes_B4 in zip(noise_images(3, 64, 64), boxes, strict=True)
    ]
    return ClassifierBatch(views, weight_2K)


@pytest.mark.parametrize("head", ["gap", "area"])
def test_the_unweighted_loss_is_the_multi_label_soft_margin_loss(head: str) -> None:
    classifier, batch = CellClassifier(head), made_batch(torch.ones(2, 3))
    logits_MK = patch_outputs(
        classifier,
        as_input(np.stack([v.rgb_HWC for v in batch.views]), CPU, TrainConfig()),
        [v.boxes_B4 for v in batch.views],
    ).logits_NK
    present_MK = torch.from_numpy(np.concatenate([v.present_BK for v in batch.views])).float()
    expected = F.multilabel_soft_margin_loss(logits_MK, present_MK)
    torch.testing.assert_close(presence_loss(classifier, batch, TrainConfig(), CPU), expected)


def test_the_weighted_loss_includes_auxiliary_logits() -> None:
    classifier = CellClassifier("abn")
    weight_2K = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.25, 1.5]])
    batch = made_batch(weight_2K)
    output = patch_outputs(
        classifier,
        as_input(np.stack([v.rgb_HWC for v in batch.views]), CPU, TrainConfig()),
        [v.boxes_B4 for v in batch.views],
    )
    present_MK = np.concatenate([v.present_BK for v in batch.views])
    assert len(output.auxiliary_NK) == 1
    expected = 0.0
    for logits_MK in (output.logits_NK, *output.auxiliary_NK):
        for m in range(len(present_MK)):
            for k in range(3):
                p = 1 / (1 + np.exp(-logits_MK[m, k].item()))
                held = present_MK[m, k]
                expected -= float(weight_2K[int(held), k]) * np.log(p if held else 1 - p) / present_MK.size
    assert presence_loss(classifier, batch, TrainConfig(), CPU).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_mean_average_precision_equals_scikit_learn_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores_MK = np.round(rng.normal(size=(60, 4)), seed % 3).astype(np.float32)
    truth_MK = rng.random((60, 4)) < (0.1, 0.5, 0.9, 0.0)
    expected = np.mean([average_precision_score(truth_MK[:, k], scores_MK[:, k]) for k in range(3)])
    assert mean_average_precision(scores_MK, truth_MK) == pytest.approx(expected, abs=1e-12)


def test_mean_average_precision_without_a_positive_patch_is_nan() -> None:
    assert np.isnan(mean_average_precision(np.zeros((4, 2), np.float32), np.zeros((4, 2), bool)))


@pytest.mark.parametrize("region", [None, 64])
def test_presence_scores_cover_all_held_out_patches(tmp_path: Path, region: int | None) -> None:
    images = crop_images(tmp_path, {"a": (64, 32), "b": (96, 64), "c": (64, 64)})
    classifier = CellClassifier("gap")
    found = presence_scores(classifier, images, TrainConfig(region=region), CPU)
    # Patches start and end on whole cells, so they do not depend on their surroundings.
    crops_NHWC = np.stack(
        [images.rgb(n)[y : y + h, x : x + w] for n in range(3) for x, y, w, h in images.boxes[n].tolist()]
    )
    with torch.inference_mode():
        logits_MK = classifier(as_input(crops_NHWC, CPU, TrainConfig()))
    present_MK = np.concatenate(images.present)
    weight_2K = class_weights(present_MK.mean(axis=0), balance=True).numpy()
    weight_MK = torch.from_numpy(np.where(present_MK, weight_2K[1], weight_2K[0]))
    loss = F.binary_cross_entropy_with_logits(logits_MK, torch.from_numpy(present_MK).float(), weight_MK).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["score"] == pytest.approx((found["map_present"] + found["map_absent"]) / 2)
    for name, sign in (("map_present", 1), ("map_absent", -1)):
        truth_MK = present_MK == (sign == 1)
        values = [average_precision_score(truth_MK[:, k], sign * logits_MK[:, k].numpy()) for k in range(3)]
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_each_held_out_patch_is_yielded_once_in_order(tmp_path: Path, limit: int) -> None:
    images = crop_images(tmp_path, {"a": (48, 32), "b": (40, 40), "c": (32, 32)})
    pixels, present, largest = [], [], 0
    for rgb_NHWC, boxes, present_MK in held_out_batches(images, whole=False, limit=limit):
        assert [b.tolist() for b in boxes] == [[[0, 0, 32, 32]]] * len(rgb_NHWC)
        pixels += list(rgb_NHWC)
        present.append(present_MK)
        largest = max(largest, len(rgb_NHWC))
    expected = [images.rgb(n)[y : y + h, x : x + w] for n in range(3) for x, y, w, h in images.boxes[n].tolist()]
    np.testing.assert_array_equal(np.stack(pixels), np.stack(expected))
    np.testing.assert_array_equal(np.concatenate(present), np.concatenate(images.present))
    assert largest == min(limit, len(expected))


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_held_out_images_of_one_size_are_batched_and_mirrored_to_valid_sides(tmp_path: Path, limit: int) -> None:
    images = crop_images(tmp_path, {"a": (48, 33), "b": (60, 40), "c": (32, 32), "d": (32, 32)})
    pixels, seen_boxes, present, sizes = [], [], [], []
    for rgb_NHWC, boxes, present_MK in held_out_batches(images, whole=True, limit=limit):
        assert rgb_NHWC.shape[1] % 32 == rgb_NHWC.shape[2] % 32 == 0
        assert len(rgb_NHWC) == 1 or sum(map(len, boxes)) <= limit
        pixels += list(rgb_NHWC)
        seen_boxes += boxes
        present.append(present_MK)
        sizes.append(len(rgb_NHWC))
    for n in range(4):
        rgb_HWC = images.rgb(n)
        height, width = rgb_HWC.shape[:2]
        np.testing.assert_array_equal(pixels[n][:height, :width], rgb_HWC)
        # The edge pixel is repeated, then the others follow in reverse order.
        for row in range(height, pixels[n].shape[0]):
            np.testing.assert_array_equal(pixels[n][row, :width], rgb_HWC[2 * height - 1 - row])
        np.testing.assert_array_equal(seen_boxes[n], images.boxes[n])
    np.testing.assert_array_equal(np.concatenate(present), np.concatenate(images.present))
    if limit == 100:
        assert sizes == [2, 2]


def test_a_step_changes_everything_except_statistics_and_frozen_parameters(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)})
    torch.manual_seed(0)
    config = TrainConfig(region=64, classifier_batch=2, classifier_steps=1, classifier_epochs=1, ema=0.0, warm_up=0)
    classifier = Classifier(config.backbone, "area", 3)
    task = classifier_task(classifier, [images], images, config, CPU, ALONE)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    fit(task, tmp_path, config, CPU)
    after = classifier.state_dict()
    statistics = [name for name in before if "running_" in name or "num_batches" in name]
    frozen = [name for name in before if name.startswith(tuple(f"backbone.net.{start}" for start in config.frozen))]
    assert len(statistics) > 100
    assert any("blocks.1" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in {*statistics, *frozen})
    moved = {name for name, _ in classifier.named_parameters()} - set(frozen)
    assert len(moved) > 50
    assert all(not torch.equal(before[name], after[name]) for name in moved)


def test_only_batch_norms_stay_in_eval_mode() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Sequential(nn.BatchNorm1d(1), nn.Dropout()))
    keep_statistics(network.train())
    assert [module.training for module in network.modules()] == [True, True, False, True, False, True]


def test_the_head_uses_the_learning_rate_of_new_parameters(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)})
    classifier = CellClassifier("area")
    task = classifier_task(classifier, [images], images, TrainConfig(region=64), CPU, ALONE)
    assert {id(p) for p in task.new_parameters} == {id(p) for p in classifier.head.parameters()}


def test_a_batch_has_the_same_views_for_any_number_of_processes(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (96, 80), "b": (70, 70)})
    config = TrainConfig(region=64, classifier_batch=5)
    whole, *shares = (
        classifier_task(CellClassifier("gap"), [images], images, config, CPU, processes).make_batch(
            np.random.default_rng(7)
        )
        for processes in (ALONE, Processes(0, 2), Processes(1, 2))
    )
    assert [len(share.views) for share in shares] == [3, 2]
    for n, view in enumerate(whole.views):
        np.testing.assert_array_equal(view.rgb_HWC, shares[n % 2].views[n // 2].rgb_HWC)
        np.testing.assert_array_equal(view.present_BK, shares[n % 2].views[n // 2].present_BK)


def test_without_regions_a_view_is_one_labeled_patch(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (96, 80)})
    task = classifier_task(CellClassifier("gap"), [images], images, TrainConfig(region=None, stain=0.0), CPU, ALONE)
    patches = {
        np.sort(images.rgb(0)[y : y + h, x : x + w].reshape(-1, 3), axis=0).tobytes(): present.tolist()
        for (x, y, w, h), present in zip(images.boxes[0].tolist(), images.present[0], strict=True)
    }
    for view in task.make_batch(np.random.default_rng(0)).views:
        assert view.boxes_B4.tolist() == [[0, 0, 32, 32]]
        assert patches[np.sort(view.rgb_HWC.reshape(-1, 3), axis=0).tobytes()] == view.present_BK[0].tolist()


def test_an_epoch_draws_as_many_pixels_as_the_images_have(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (96, 64), "b": (64, 64)})
    assert steps_per_epoch([images], 32, 2) == round((96 * 64 + 64 * 64) / (32 * 32 * 2)) == 5
    assert steps_per_epoch([images], 224, 20) == 1
    # At half the pixel size, the images have four times the pixels.
    both = at_pixel_sizes(images, [images.dataset.mpp / 2, images.dataset.mpp])
    assert steps_per_epoch(both, 32, 2) == round((96 * 64 + 64 * 64) * (4 + 1) / 2 / (32 * 32 * 2)) == 12
    # A labeled patch alone has the same share of the pixels at every size.
    assert steps_per_epoch(both, None, 2) == 5


def test_each_step_draws_one_of_the_pixel_sizes(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (192, 160), "b": (128, 128)})
    mpp = images.dataset.mpp
    both = at_pixel_sizes(images, (mpp, 2 * mpp))
    config = TrainConfig(region=64, classifier_batch=3)
    task = classifier_task(CellClassifier("gap"), both, images, config, CPU, ALONE)
    assert task.steps == steps_per_epoch(both, 64, 3)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(20):
        views = task.make_batch(rng).views
        assert {view.rgb_HWC.shape for view in views} == {(64, 64, 3)}
        (side,) = {side for view in views for side in view.boxes_B4[:, 2:].flatten().tolist()}
        drawn.append(side)
    # The labeled patches have 32 px, and half as many at twice the pixel size.
    assert set(drawn) == {32, 16}
    assert 5 <= drawn.count(16) <= 15


def test_attention_dropout_follows_its_schedule(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)})
    with_attention = TrainConfig(head="gap", attention="pda", region=64, classifier_epochs=20)
    for config, expected in (
        (with_attention, [1, 1, 1, 0.985, 0.985**2]),
        (replace(with_attention, pda_schedule="release"), [None, None, None, 0.98**3, 0.98**4]),
        (replace(with_attention, attention="none"), [None] * 5),
    ):
        classifier = CellClassifier("gap")
        task = classifier_task(classifier, [images], images, config, CPU, ALONE)
        seen = []
        for epoch in range(5):
            task.begin_epoch(epoch)
            assert classifier.head.training
            seen.append(classifier.mu)
        assert seen == pytest.approx(expected)


def test_the_last_stage_trains_the_head_alone_without_attention(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)})
    torch.manual_seed(0)
    config = TrainConfig(
        attention="pda",
        shared_backbone=True,
        head_epochs=1,
        region=64,
        classifier_batch=2,
        classifier_steps=2,
        ema=0.0,
        warm_up=0,
    )
    classifier = Classifier(config.backbone, "area", 3, depth=4)
    classifier.mu = 0.7
    task = head_task(classifier, images, images, config, CPU, ALONE)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    fit(task, tmp_path, config, CPU)
    assert (task.name, task.epochs, task.steps) == ("head", 1, 2)
    mu: float | None = classifier.mu
    assert mu is None
    changed = {name for name, tensor in classifier.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {f"head.{name}" for name, _ in classifier.head.named_parameters()}


def test_the_score_skips_a_measure_without_patches(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (32, 32)})
    found = presence_scores(CellClassifier("gap"), images, TrainConfig(), CPU)
    assert np.isfinite(found["score"])
    assert np.isnan(found["map_absent"])  # the only patch holds all classes


def test_heads_of_layers_read_the_same_boxes_as_the_deep_head(tmp_path: Path) -> None:
    classifier = CellClassifier("gap", layers=("shallow",)).train()
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    rgb_NHWC = noise_images(1, 64, 64)
    boxes_B4 = np.array([[0, 0, 32, 32], [32, 16, 32, 32]])
    output = patch_outputs(classifier, as_input(rgb_NHWC, CPU, TrainConfig()), [boxes_B4])
    shallow_1Chw = classifier.stages(as_input(rgb_NHWC, CPU, TrainConfig())).shallow
    (auxiliary_BK,) = output.auxiliary_NK
    for logits_K, (x, y, w, h) in zip(auxiliary_BK, (boxes_B4 // 8).tolist(), strict=True):
        crop_1Chw = shallow_1Chw[:, :, y : y + h, x : x + w]
        torch.testing.assert_close(logits_K[None], classifier.layer_heads["shallow"](crop_1Chw, None).logits_NK)


def test_the_head_of_the_release_is_drawn_from_glorots_uniform_distribution() -> None:
    torch.manual_seed(0)
    config = TrainConfig(backbone="resnet18", depth=None, head="gap", weights="none")
    weights = {
        xavier: build_classifier(dataclasses.replace(config, xavier_head=xavier), 3).head.weight_KC.detach().abs()
        for xavier in (False, True)
    }
    # sqrt(6 / (inputs + outputs)), and the default of a convolution: 1 / sqrt(inputs).
    assert 0.9 < weights[True].max().item() / math.sqrt(6 / (512 + 3)) <= 1
    assert 0.9 < weights[False].max().item() / math.sqrt(1 / 512) <= 1


def test_the_rules_for_biases_and_momentum_are_those_of_the_classifier(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (32, 32)})
    config = TrainConfig(bias_factor=2.0, decay_biases=False, momentum=5e-4)
    task = classifier_task(CellClassifier("gap"), [images], images, config, CPU, Processes(0, 1))
    assert (task.bias_factor, task.decay_biases, task.momentum) == (2.0, False, 5e-4)
