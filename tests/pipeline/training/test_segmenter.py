from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.classifier import Classifier
from models.segmenter import build_segmenter, encoder_network, share_backbone
from pipeline.errors import TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import IGNORED
from pipeline.training.dataset_sections import FolderLabels
from pipeline.training.fit import Processes, fit
from pipeline.training.inputs import as_input
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_masks import read_pseudo_masks, write_pseudo_masks
from pipeline.training.segmenter import (
    check_taught,
    layered_loss,
    map_scores,
    pixel_counts,
    pixel_weights,
    segmenter_task,
    start_encoder,
    trusted_logits,
)
from tests.pipeline.training.cells import CellClassifier, crop_images

CPU = torch.device("cpu")
ALONE = Processes(0, 1)


def read_from(folder: Path, images: PatchImages, config: TrainConfig) -> Callable[[int], NDArray[np.uint8]]:
    return partial(read_pseudo_masks, folder, images, config=config)


def slow_loss(logits: list, labels: list, weights: tuple[float, ...], weight_K: list[float]) -> float:  # type: ignore[type-arg]
    """Sum pixel by pixel; the label of a 4×4 cell is the label of its pixel (2, 2)."""
    total = 0.0
    for layer, weight in enumerate(weights):
        summed = counted = 0.0
        for n in range(len(logits)):
            for row in range(len(logits[n][0])):
                for column in range(len(logits[n][0][0])):
                    label = labels[n][layer][4 * row + 2][4 * column + 2]
                    if label == IGNORED:
                        continue
                    scores = [logits[n][k][row][column] for k in range(len(logits[n]))]
                    log_sum = math.log(sum(math.exp(score) for score in scores))
                    summed += weight_K[label] * (log_sum - scores[label])
                    counted += weight_K[label]
        if counted:
            total += weight * summed / counted
    return total


@pytest.mark.parametrize("weight_K", [None, [0.5, 1.0, 3.0]])
@pytest.mark.parametrize("weights", [(0.2, 0.2, 0.6), (0.7, 0.0, 0.3)])
def test_the_loss_is_the_weighted_cross_entropy_of_each_layer(
    weights: tuple[float, ...], weight_K: list[float] | None
) -> None:
    rng = np.random.default_rng(0)
    logits_NKhw = torch.from_numpy(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))
    labels_NLHW = rng.choice([0, 1, 2, IGNORED], size=(2, 3, 16, 20)).astype(np.uint8)
    expected = slow_loss(logits_NKhw.tolist(), labels_NLHW.tolist(), weights, weight_K or [1.0] * 3)
    found = layered_loss(
        logits_NKhw, torch.from_numpy(labels_NLHW), weights, None if weight_K is None else torch.tensor(weight_K)
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_layer_without_a_labeled_pixel_adds_nothing_and_its_gradient_is_zero() -> None:
    rng = np.random.default_rng(1)
    logits_NKhw = torch.from_numpy(rng.normal(size=(1, 3, 4, 4)).astype(np.float32)).requires_grad_()
    labels_NLHW = torch.from_numpy(rng.integers(0, 3, (1, 2, 16, 16)).astype(np.uint8))
    labels_NLHW[:, 1] = IGNORED
    alone = layered_loss(logits_NKhw, labels_NLHW[:, :1], (0.4,))
    torch.testing.assert_close(layered_loss(logits_NKhw, labels_NLHW, (0.4, 0.6)), alone)
    nothing = layered_loss(logits_NKhw, torch.full_like(labels_NLHW, IGNORED), (0.4, 0.6))
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, logits_NKhw)
    assert not gradient.any()


def test_the_balanced_weight_of_a_pixel_is_the_root_of_the_inverse_class_share() -> None:
    pseudo = [np.full((1, 10, 10), IGNORED, np.uint8), np.full((1, 4, 5), 1, np.uint8)]
    pseudo[0][0, :8] = 0
    counts_LX = pixel_counts(pseudo, 2)
    assert counts_LX.tolist() == [[80, 20, 20]]
    weight_K = pixel_weights(counts_LX[0, :2], balance=True)
    assert weight_K.tolist() == pytest.approx([math.sqrt(100 / (2 * 80)), math.sqrt(100 / (2 * 20))])
    assert pixel_weights(counts_LX[0, :2], balance=False).tolist() == [1.0, 1.0]


def test_no_pixel_weighs_more_than_ten_even_of_a_class_without_pixels() -> None:
    assert pixel_weights(np.array([10_000, 0]), balance=True).tolist() == pytest.approx([math.sqrt(0.5), 10.0])
    assert torch.isfinite(pixel_weights(np.array([0, 0]), balance=True)).all()


def test_the_share_that_teaches_each_class_is_logged_for_each_layer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = TrainConfig(layer_weights=(0.5, 0.0, 0.5))
    check_taught(np.array([[25, 50, 25], [75, 25, 0]]), ("gland", "other"), config)
    assert caplog.messages == [
        "pixels of the shallow pseudo masks: gland 25.00%, other 50.00%, ignored 25.00%",
        "pixels of the deep pseudo masks: gland 75.00%, other 25.00%, ignored 0.00%",
    ]


def test_masks_that_teach_almost_nothing_are_refused_and_the_error_states_what_to_do() -> None:
    with pytest.raises(
        TrainError,
        match=r"the deep pseudo masks have a class in 0\.04% of the pixels.*1%.*folder pseudo-masks; set a lower conf",
    ):
        check_taught(np.array([[3, 1, 9996]]), ("gland", "other"), TrainConfig())


def test_the_error_names_a_class_that_no_pixel_teaches() -> None:
    with pytest.raises(TrainError, match="in class other, so the map would never show it"):
        check_taught(np.array([[9000, 0, 1000]]), ("gland", "other"), TrainConfig())


def test_a_segmenter_that_is_taught_nothing_does_not_start(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (64, 64)})
    config = TrainConfig(region=64, view=96, margin=32, confidence=1.0)
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap"), images, config, CPU, ALONE)
    with pytest.raises(TrainError, match=r"the deep pseudo masks have a class in 0\.00% of the pixels"):
        segmenter_task(nn.Identity(), images, images, read_from(tmp_path / "masks", images, config), config, CPU, ALONE)


class Reddest(nn.Module):
    """Predicts the strongest color channel of each 4×4 cell as its class."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_NCHW, 4)


def painted(folder: Path, bands: dict[str, list[tuple[int, int]]], *, side: int = 16, stride: int = 16) -> PatchImages:
    """Return images of vertical bands, (channel, width), labeled by the thirds that `crop_images` draws."""
    sizes = {name: (sum(width for _, width in of_image), 32) for name, of_image in bands.items()}
    images = crop_images(folder, sizes, side=side, stride=stride)
    for sample in images.samples:
        rows = [np.eye(3)[channel] * 200 for channel, width in bands[sample.name] for _ in range(width)]
        rgb_HWC = np.broadcast_to(np.array(rows, dtype=np.uint8), (32, len(rows), 3))
        Image.fromarray(np.ascontiguousarray(rgb_HWC)).save(sample.image)
    return images


@pytest.mark.parametrize("region", [None, 64])
def test_a_map_that_agrees_with_all_presence_labels_scores_one(tmp_path: Path, region: int | None) -> None:
    images = painted(tmp_path, {"a": [(0, 32), (1, 32), (2, 32)], "b": [(0, 16), (1, 16), (2, 16)]}, side=32)
    assert map_scores(Reddest(), images, TrainConfig(region=region), CPU) == {
        "score": 1.0,
        "score_error": 0.0,
        "balanced": 1.0,
        "exact": 1.0,
    }


@pytest.mark.parametrize("region", [None, 64])
def test_the_score_is_the_mean_over_classes_of_the_balanced_accuracy(tmp_path: Path, region: int | None) -> None:
    # The labels are thirds of 32 px, so each of the six patches contains one class. Class 2 is never predicted: one of
    # its two patches is predicted as 0, the other as 1.
    images = painted(tmp_path, {"a": [(0, 32), (1, 32), (0, 16), (1, 16)]}, side=32)
    images.boxes = [np.array([(x, 0, 16, 16) for x in range(0, 96, 16)])]
    images.present = [np.repeat(np.eye(3, dtype=bool), 2, axis=0)]
    found = map_scores(Reddest(), images, TrainConfig(region=region), CPU)
    balanced = [(1.0 + 3 / 4) / 2, (1.0 + 3 / 4) / 2, (0.0 + 1.0) / 2]
    assert found == {
        "score": pytest.approx((np.mean(balanced) + 4 / 6) / 2),
        "score_error": pytest.approx(0.0),  # there is only one image
        "balanced": pytest.approx(np.mean(balanced)),
        "exact": pytest.approx(4 / 6),
    }


def test_the_score_of_classes_that_are_in_all_patches_or_in_none_is_the_share_of_right_answers(tmp_path: Path) -> None:
    images = painted(tmp_path, {"a": [(0, 32)]}, side=32)
    images.present = [np.array([[True, False, True]] * len(images.boxes[0]))]
    found = map_scores(Reddest(), images, TrainConfig(region=None), CPU)
    assert found["balanced"] == pytest.approx(2 / 3)
    assert found["exact"] == 0


def test_the_error_of_the_score_is_the_spread_over_images(tmp_path: Path) -> None:
    """One image is entirely right and one entirely wrong, so a bootstrap over them draws scores of 0, 1/2 and 1."""
    images = painted(tmp_path, {"a": [(0, 32)], "b": [(0, 32)]}, side=32)
    images.boxes = [np.array([(x, 0, 16, 16) for x in (0, 16)])] * 2
    images.ends_N = np.array([2, 4])
    images.present = [np.array([[True, False, False]] * 2), np.array([[False, True, True]] * 2)]
    found = map_scores(Reddest(), images, TrainConfig(region=None), CPU)
    assert found["score"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["score_error"] == pytest.approx(np.sqrt(1 / 8), rel=0.1)


@pytest.mark.parametrize(("minimum", "found"), [("0.05", True), ("0.5", False)])
def test_a_class_is_found_if_it_covers_more_than_the_minimum_of_the_data_set(
    tmp_path: Path, minimum: str, found: bool
) -> None:
    images = painted(tmp_path, {"a": [(0, 24), (1, 8)]}, side=32)
    labels = images.dataset.card.labels.model_copy(update={"minimum": float(minimum)})
    card = images.dataset.card.model_copy(update={"labels": labels})
    object.__setattr__(images.dataset, "card", card)
    images.present = [np.array([[True, found, False]])]
    assert map_scores(Reddest(), images, TrainConfig(region=None), CPU)["exact"] == 1.0


def test_a_minimum_of_zero_finds_a_class_that_covers_a_single_cell(tmp_path: Path) -> None:
    images = painted(tmp_path, {"a": [(0, 92), (1, 4)]}, side=32)
    labels = images.dataset.card.labels.model_copy(update={"minimum": 0.0})
    object.__setattr__(images.dataset, "card", images.dataset.card.model_copy(update={"labels": labels}))
    images.boxes = [np.array([(0, 0, 96, 32)])]
    images.present = [np.array([[True, True, False]])]
    assert map_scores(Reddest(), images, TrainConfig(region=None), CPU)["exact"] == 1.0


@pytest.mark.parametrize(
    ("labels_K", "keys", "found"),
    [(None, {"mask_minimum": 0.3}, False), (None, {}, True), ((True,) * 3, {"mask_minimum": 0.3}, True)],
)
def test_the_minimum_of_whole_masks_decides_if_labels_come_from_masks(
    tmp_path: Path, labels_K: tuple[bool, ...] | None, keys: dict[str, float], found: bool
) -> None:
    images = painted(tmp_path, {"a": [(0, 24), (1, 8)]}, side=32)
    labels = FolderLabels(source="folders", splits=("train",), **keys)  # type: ignore[arg-type]
    object.__setattr__(images.dataset, "card", images.dataset.card.model_copy(update={"labels": labels}))
    images.samples = tuple(dataclasses.replace(sample, labels_K=labels_K) for sample in images.samples)
    images.present = [np.array([[True, found, False]])]
    assert map_scores(Reddest(), images, TrainConfig(region=None), CPU)["exact"] == 1.0


def test_a_step_trains_all_weights_and_keeps_the_statistics_of_the_encoder(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (64, 64)})
    config = TrainConfig(
        region=64, view=96, margin=32, segmenter_batch=2, segmenter_steps=1, segmenter_epochs=1, ema=0.0, confidence=0.0
    )
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap", seed=5), images, config, CPU, ALONE)
    torch.manual_seed(0)
    segmenter = build_segmenter("tu-tf_efficientnet_lite0", 3)
    task = segmenter_task(segmenter, images, images, read_from(tmp_path / "masks", images, config), config, CPU, ALONE)
    new = {id(parameter) for parameter in task.new_parameters}
    named = dict(segmenter.named_parameters())
    assert {name for name, parameter in named.items() if id(parameter) in new} == {
        name for name in named if not name.startswith("encoder.")
    }
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    fit(task, tmp_path, config, CPU)
    after = segmenter.state_dict()
    kept = [name for name in before if name.startswith("encoder.") and ("running_" in name or "batches" in name)]
    assert len(kept) > 90
    assert all(torch.equal(before[name], after[name]) for name in kept)
    frozen = tuple(f"encoder.model.{prefix}" for prefix in config.frozen)
    for name in named:
        assert torch.equal(before[name], after[name]) == name.startswith(frozen), name


@pytest.mark.parametrize("weights", ["imagenet", "none"])
@pytest.mark.parametrize("head_epochs", [0, 1])
def test_a_shared_backbone_is_trained_only_if_the_head_follows_it(
    tmp_path: Path, weights: str, head_epochs: int
) -> None:
    images = crop_images(tmp_path / "data", {"a": (64, 64)})
    config = TrainConfig(
        weights=weights,
        shared_backbone=True,
        head_epochs=head_epochs,
        region=64,
        view=96,
        margin=32,
        segmenter_batch=2,
        segmenter_steps=2,
        segmenter_epochs=1,
        confidence=0.0,
    )
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap", seed=5), images, config, CPU, ALONE)
    torch.manual_seed(0)
    segmenter = build_segmenter(
        "tu-tf_efficientnet_lite0", 3, decoder_channels=16, keeps_backbone=config.keeps_backbone
    )
    share_backbone(segmenter, Classifier("tf_efficientnet_lite0", "gap", 3, depth=4))
    task = segmenter_task(segmenter, images, images, read_from(tmp_path / "masks", images, config), config, CPU, ALONE)
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    fit(task, tmp_path, config, CPU)
    changed = {name for name, tensor in segmenter.state_dict().items() if not torch.equal(before[name], tensor)}
    parameters = {name for name, _ in segmenter.named_parameters()}
    kept: tuple[str, ...] = ("encoder.",)
    if head_epochs:
        kept = tuple(f"encoder.model.{part}" for part in config.frozen) if weights == "imagenet" else ()
    assert {name for name in parameters if not name.startswith(kept)} <= changed
    assert not any(name.startswith(kept) for name in changed)


def test_the_loss_reads_only_pixels_with_a_margin_of_context(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (80, 40)}, side=40, stride=40)
    config = TrainConfig(region=None, view=128, margin=32, segmenter_batch=4, stain=0.0, confidence=0.0)
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap", seed=5), images, config, CPU, ALONE)
    torch.manual_seed(0)
    segmenter = build_segmenter("tu-tf_efficientnet_lite0", 3)
    task = segmenter_task(segmenter, images, images, read_from(tmp_path / "masks", images, config), config, CPU, ALONE)
    batch = task.make_batch(np.random.default_rng(0))
    assert batch.rgb_NHWC.shape == (4, 128, 128, 3)
    assert batch.labels_NLHW.shape == (4, 1, 128, 128)
    assert (batch.labels_NLHW[..., 32:-32, 32:-32] != IGNORED).all()
    edge = np.ones((128, 128), bool)
    edge[32:-32, 32:-32] = False
    assert (batch.labels_NLHW[..., edge] == IGNORED).all()
    task.begin_epoch(0)
    assert torch.isfinite(task.loss(batch))


def test_validation_gives_every_pixel_of_an_image_the_margin_of_the_run() -> None:
    rgb_NHWC = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8)
    seen: list[Tensor] = []

    def network(x_NCHW: Tensor) -> Tensor:
        seen.append(x_NCHW)
        return F.avg_pool2d(x_NCHW, 4)

    logits_NKhw = trusted_logits(network, rgb_NHWC, TrainConfig(margin=32), CPU)  # type: ignore[arg-type] # only called
    assert seen[0].shape == (2, 3, 128, 96)
    torch.testing.assert_close(logits_NKhw, F.avg_pool2d(as_input(rgb_NHWC, CPU, TrainConfig()), 4))


def test_the_shares_of_a_batch_are_the_views_of_the_whole_batch(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (96, 70), "b": (70, 70)})
    config = TrainConfig(region=64, view=96, margin=32, segmenter_batch=3, confidence=0.0)
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap"), images, config, CPU, ALONE)
    segmenter = build_segmenter("resnet18", 3)
    whole, first, second = (
        segmenter_task(
            segmenter, images, images, read_from(tmp_path / "masks", images, config), config, CPU, processes
        ).make_batch(np.random.default_rng(7))
        for processes in (ALONE, Processes(0, 2), Processes(1, 2))
    )
    np.testing.assert_array_equal(whole.rgb_NHWC[::2], first.rgb_NHWC)
    np.testing.assert_array_equal(whole.rgb_NHWC[1::2], second.rgb_NHWC)
    np.testing.assert_array_equal(whole.labels_NLHW[::2], first.labels_NLHW)


def test_an_encoder_with_weights_of_its_own_starts_from_them_at_the_rate_of_pretrained_weights(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (64, 64)})
    source = encoder_network(build_segmenter("resnet18", 3)).state_dict()
    file = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in source.items()}, file)
    config = TrainConfig(
        weights="none", encoder="resnet18", encoder_weights=str(file), bias_factor=2.0, decay_biases=False
    )
    segmenter = build_segmenter("resnet18", 3)
    start_encoder(segmenter, config)
    state = encoder_network(segmenter).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in state.items())
    thirds_1HW = np.repeat(np.arange(3, dtype=np.uint8), 22)[None, None, :64].repeat(64, axis=1)
    task = segmenter_task(segmenter, images, images, lambda _: thirds_1HW, config, CPU, ALONE)
    new = {id(parameter) for parameter in task.new_parameters}
    named = dict(segmenter.named_parameters())
    assert {name for name in named if id(named[name]) not in new} == {n for n in named if n.startswith("encoder.")}
    # The release treats only the classifier's biases differently.
    assert (task.bias_factor, task.decay_biases, task.momentum) == (1.0, True, 0.9)
