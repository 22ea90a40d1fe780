from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.cam import layer_maps
from pipeline.errors import TrainError
from pipeline.training import pseudo_masks
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import IGNORED, background_HW, load_dataset, samples
from pipeline.training.fit import Processes
from pipeline.training.inputs import as_input
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_masks import (
    allowed_classes,
    class_probabilities,
    jointly_scaled,
    mask_files,
    pseudo_masks_of_image,
    read_pseudo_masks,
    write_pseudo_masks,
)
from tests.pipeline.training.cells import CellClassifier, crop_images, noise_images
from tests.textures import write_crops

CPU = torch.device("cpu")
ALONE = Processes(0, 1)
THREE_LAYERS = TrainConfig(cam="grad-cam", layer_weights=(0.2, 0.2, 0.6), overlap_labels=False)


@given(st.data(), st.booleans())
def test_a_pixel_can_have_the_classes_of_its_patches(data: st.DataObject, overlap: bool) -> None:
    count = data.draw(st.integers(1, 5))
    boxes = [tuple(data.draw(st.integers(low, 6)) for low in (0, 0, 1, 1)) for _ in range(count)]
    present = [[data.draw(st.booleans()) for _ in range(3)] for _ in range(count)]
    found_KHW = allowed_classes(np.array(boxes), np.array(present), (10, 9), overlap=overlap)
    for py in range(10):
        for px in range(9):
            over = [
                held for (x, y, w, h), held in zip(boxes, present, strict=True) if x <= px < x + w and y <= py < y + h
            ]
            any_of = [any(held[k] for held in over) for k in range(3)]
            all_of = [bool(over) and all(held[k] for held in over) for k in range(3)]
            expected = all_of if overlap and any(all_of) else any_of
            assert found_KHW[:, py, px].tolist() == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.integers(4, 12), st.integers(4, 12))
def test_maps_are_scaled_jointly_over_all_classes_of_a_patch(
    seed: int, height: int, width: int, up_height: int, up_width: int
) -> None:
    map_NKhw = np.random.default_rng(seed).normal(size=(2, 3, height, width)).astype(np.float32)
    scaled_NKHW = jointly_scaled(torch.from_numpy(map_NKhw), (up_height, up_width)).numpy()
    for n in range(2):
        up_KHW = np.stack([bilinear(map_hw, up_height, up_width) for map_hw in map_NKhw[n]])
        expected_KHW = (up_KHW - up_KHW.min()) / (up_KHW.max() - up_KHW.min())
        np.testing.assert_allclose(scaled_NKHW[n], expected_KHW, atol=2e-5)


def bilinear(map_hw: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
    """Upsample bilinearly with aligned pixel centers and repeated edges, slowly."""
    (h, w), out_HW = map_hw.shape, np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((column + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = map_hw[y0, x0] * (1 - x + x0) + map_hw[y0, x1] * (x - x0)
            low = map_hw[y1, x0] * (1 - x + x0) + map_hw[y1, x1] * (x - x0)
            out_HW[row, column] = top * (1 - y + y0) + low * (y - y0)
    return out_HW


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_constant_map_is_scaled_to_zero(value: float) -> None:
    assert not jointly_scaled(torch.full((1, 3, 2, 2), value), (4, 4)).any()


def labeled(images: PatchImages, present: list[list[list[bool]]]) -> PatchImages:
    images.present = [np.array(of_image) for of_image in present]
    return images


@pytest.mark.parametrize("config", [TrainConfig(), THREE_LAYERS], ids=["head", "grad-cam"])
def test_a_patch_of_one_class_is_filled_with_it(tmp_path: Path, config: TrainConfig) -> None:
    images = labeled(crop_images(tmp_path, {"a": (40, 32)}, side=40), [[[False, True, False]]])
    images.boxes = [np.array([(0, 0, 40, 32)])]
    masks_LHW = pseudo_masks_of_image(CellClassifier("gap"), images, 0, config, CPU)
    assert masks_LHW.shape == (sum(weight > 0 for weight in config.layer_weights), 32, 40)
    assert (masks_LHW == 1).all()


@pytest.mark.parametrize("present", [[False, True, True], [True, False, True], [False, False, True]])
def test_constant_maps_give_no_pixel_an_absent_class(tmp_path: Path, present: list[bool]) -> None:
    images = labeled(crop_images(tmp_path, {"a": (32, 32)}), [[present]])
    classifier = CellClassifier("gap")
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    for config in (THREE_LAYERS, TrainConfig(confidence=0.0)):
        masks_LHW = pseudo_masks_of_image(classifier, images, 0, config, CPU)
        assert set(np.unique(masks_LHW).tolist()) <= {k for k in range(3) if present[k]}


@pytest.mark.parametrize("method", ["grad-cam", "cam", "grad-cam++"])
def test_maps_of_overlapping_patches_are_averaged(tmp_path: Path, method: str) -> None:
    images = crop_images(tmp_path, {"a": (72, 52)}, side=24, stride=16)
    rng = np.random.default_rng(0)
    images.present = [rng.random((len(images.boxes[0]), 3)) < 0.6]
    assert len(images.boxes[0]) > pseudo_masks.BATCH / 2
    classifier = CellClassifier("gap")
    rgb_HWC = images.rgb(0)
    sums_LKHW, count_HW = np.zeros((2, 3, 52, 72)), np.zeros((52, 72))
    for (x, y, w, h), present_K in zip(images.boxes[0].tolist(), images.present[0], strict=True):
        maps = layer_maps(method, classifier, as_input(rgb_HWC[None, y : y + h, x : x + w], CPU, TrainConfig()))
        for row, map_1Khw in enumerate((maps.middle, maps.deep)):
            up_KHW = np.stack([bilinear(map_hw, h, w) for map_hw in map_1Khw[0].detach().numpy()])
            scaled_KHW = (up_KHW - up_KHW.min()) / (up_KHW.max() - up_KHW.min())
            if present_K.sum() == 1:
                scaled_KHW[:] = 1
            scaled_KHW[~present_K] = 0
            sums_LKHW[row, :, y : y + h, x : x + w] += scaled_KHW
        count_HW[y : y + h, x : x + w] += 1
    expected_LKHW = sums_LKHW / count_HW
    config = TrainConfig(cam=method, layer_weights=(0.0, 0.5, 0.5), overlap_labels=False)
    for batch in (16, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pseudo_masks, "BATCH", batch)
            found_LKHW = pseudo_masks._maps_of_patches(classifier, images, 0, config, CPU)
            masks_LHW = pseudo_masks_of_image(classifier, images, 0, config, CPU)
        np.testing.assert_allclose(found_LKHW, expected_LKHW, atol=1e-5)
        any_KHW = allowed_classes(images.boxes[0], images.present[0], (52, 72), overlap=False)
        ranked_LKHW = np.sort(np.where(any_KHW, expected_LKHW, -1), axis=1)
        clear_LHW = (ranked_LKHW[:, -1] - ranked_LKHW[:, -2] > 1e-4) & any_KHW.any(axis=0)
        assert clear_LHW.mean() > 0.8
        wanted_LHW = np.where(any_KHW, expected_LKHW, -1).argmax(axis=1)
        np.testing.assert_array_equal(masks_LHW[clear_LHW], wanted_LHW[clear_LHW])
        assert (masks_LHW[:, ~any_KHW.any(axis=0)] == IGNORED).all()


@pytest.mark.parametrize("size", [(64, 32), (40, 50)])
def test_class_probabilities_are_the_mean_over_four_flips(size: tuple[int, int]) -> None:
    height, width = size
    rgb_HWC = noise_images(1, height, width)[0]
    classifier = CellClassifier("area")
    bottom, right = -height % 32, -width % 32
    whole_HWC = np.pad(rgb_HWC, [(0, bottom), (0, right), (0, 0)], mode="symmetric")
    total_KHW = np.zeros((3, *whole_HWC.shape[:2]))
    for rows in (1, -1):
        for columns in (1, -1):
            flipped_HWC = np.ascontiguousarray(whole_HWC[::rows, ::columns])
            x_1CHW = as_input(flipped_HWC[None], CPU, TrainConfig())
            with torch.inference_mode():
                map_Khw = classifier.head_output(classifier.stages(x_1CHW), x_1CHW).map_NKhw[0].numpy()
            up_KHW = np.stack([bilinear(map_hw, *whole_HWC.shape[:2]) for map_hw in map_Khw])
            raised_KHW = np.exp(up_KHW - up_KHW.max(axis=0))
            total_KHW += (raised_KHW / raised_KHW.sum(axis=0))[:, ::rows, ::columns]
    found_KHW = class_probabilities(classifier, rgb_HWC, TrainConfig(), CPU)[0]
    np.testing.assert_allclose(found_KHW, total_KHW[:, :height, :width] / 4, atol=1e-4)


class Certain(CellClassifier):
    """Scores -8 in each 8×8 cell, except for one class that depends on brightness: 8, or 0.1 in dark cells."""

    def layer_output(self, layer: str, stages: object, x_NCHW: Tensor) -> object:  # type: ignore[override]
        bright_Nhw = F.avg_pool2d(x_NCHW.mean(dim=1, keepdim=True), 8)[:, 0]
        sure_Nhw = torch.where(bright_Nhw > -0.5, 8.0, 0.0)
        map_NKhw = torch.zeros(len(x_NCHW), 3, *bright_Nhw.shape[1:])
        map_NKhw[:, 1] = sure_Nhw + 0.1
        return type("Output", (), {"map_NKhw": map_NKhw})


def test_uncertain_pixels_are_ignored_unless_the_labels_allow_only_one_class(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)}, side=64)
    rgb_HWC = np.full((64, 64, 3), 200, np.uint8)
    rgb_HWC[:, 32:] = 10
    Image.fromarray(rgb_HWC).save(images.samples[0].image)
    classifier = Certain("area")
    labeled(images, [[[True, True, False]]])
    (mask_HW,) = pseudo_masks_of_image(classifier, images, 0, TrainConfig(confidence=0.6), CPU)
    assert (mask_HW[:, :28] == 1).all()
    assert (mask_HW[:, 36:] == IGNORED).all()
    (mask_HW,) = pseudo_masks_of_image(classifier, images, 0, TrainConfig(confidence=0.3), CPU)
    assert (mask_HW == 1).all()
    # On the left the network is sure of class 1, which the label excludes. The allowed classes are unsure there.
    labeled(images, [[[True, False, True]]])
    (mask_HW,) = pseudo_masks_of_image(classifier, images, 0, TrainConfig(confidence=0.3), CPU)
    assert (mask_HW[:, :28] == IGNORED).all()
    labeled(images, [[[True, False, False]]])
    (mask_HW,) = pseudo_masks_of_image(classifier, images, 0, TrainConfig(confidence=0.6), CPU)
    assert (mask_HW == 0).all()


@pytest.mark.parametrize("config", [TrainConfig(confidence=0.0), THREE_LAYERS], ids=["head", "grad-cam"])
def test_background_by_the_rule_of_the_data_set_is_ignored(tmp_path: Path, config: TrainConfig) -> None:
    extra = "\n[background]\ngray_above = 200\nsmallest_px = 20\n"
    dataset = load_dataset(write_crops(tmp_path, {"a": (48, 48)}, side=48, stride=48, extra=extra))
    images = PatchImages(dataset, samples(dataset, "train"), 1.0)
    rgb_HWC = images.rgb(0).copy()
    rgb_HWC[10:30, 5:20] = 240
    rgb_HWC[40:43, 40:43] = 240  # too small to be glass
    Image.fromarray(rgb_HWC).save(images.samples[0].image)
    images = PatchImages(dataset, images.samples, 1.0)
    masks_LHW = pseudo_masks_of_image(CellClassifier("gap"), images, 0, config, CPU)
    glass_HW = np.zeros((48, 48), bool)
    glass_HW[10:30, 5:20] = True
    assert dataset.card.background is not None
    np.testing.assert_array_equal(background_HW(rgb_HWC, dataset.card.background), glass_HW)
    for mask_HW in masks_LHW:
        np.testing.assert_array_equal(mask_HW == IGNORED, glass_HW)


def test_masks_are_palette_images_in_the_colors_of_the_classes(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a.1": (48, 32), "a.2": (32, 40)})
    classifier = CellClassifier("gap").train()
    seen: list[tuple[str, int, int]] = []
    write_pseudo_masks(
        tmp_path / "masks", classifier, images, THREE_LAYERS, CPU, ALONE, lambda *step: seen.append(step)
    )
    assert seen == [("pseudo masks", 1, 2), ("pseudo masks", 2, 2)]
    files = {str(file.relative_to(tmp_path / "masks")) for file in (tmp_path / "masks").rglob("*") if file.is_file()}
    assert files == {f"{layer}/{name}.png" for layer in ("shallow", "middle", "deep") for name in ("a.1", "a.2")}
    for index in range(2):
        expected_LHW = pseudo_masks_of_image(classifier, images, index, THREE_LAYERS, CPU)
        np.testing.assert_array_equal(read_pseudo_masks(tmp_path / "masks", images, index, THREE_LAYERS), expected_LHW)
        for layer, file in enumerate(mask_files(tmp_path / "masks", images, index, THREE_LAYERS)):
            with Image.open(file) as picture:
                assert picture.mode == "P"
                np.testing.assert_array_equal(np.asarray(picture), expected_LHW[layer])
                palette = picture.getpalette()
                rgb_HWC = np.asarray(picture.convert("RGB"))
            assert palette is not None
            assert palette[:9] == [205, 51, 51, 65, 105, 225, 255, 165, 0]
            colors = np.array([*(one.color for one in images.dataset.classes), *[(255, 255, 255)] * 253])
            np.testing.assert_array_equal(rgb_HWC, colors[expected_LHW[layer]])


def test_only_layers_with_a_weight_are_written(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (32, 32)})
    config = TrainConfig(cam="grad-cam", layer_weights=(0.5, 0.0, 0.5))
    write_pseudo_masks(tmp_path / "masks", CellClassifier("gap"), images, config, CPU, ALONE)
    assert sorted(file.name for file in (tmp_path / "masks").iterdir()) == ["deep", "shallow"]


def test_existing_masks_are_kept_and_missing_ones_written(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (32, 32), "b": (48, 48)})
    config = TrainConfig(confidence=0.0, overlap_labels=False)
    write_pseudo_masks(tmp_path, CellClassifier("gap", seed=0), images, config, CPU, ALONE)
    (first,), (second,) = (mask_files(tmp_path, images, n, config) for n in range(2))
    kept, old = first.read_bytes(), second.read_bytes()
    second.unlink()
    other = CellClassifier("gap", seed=1)
    write_pseudo_masks(tmp_path, other, images, config, CPU, ALONE)
    assert first.read_bytes() == kept
    assert second.read_bytes() != old
    (expected_HW,) = pseudo_masks_of_image(other, images, 1, config, CPU)
    np.testing.assert_array_equal(read_pseudo_masks(tmp_path, images, 1, config)[0], expected_HW)


def test_several_processes_share_the_images(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", dict.fromkeys("abc", (32, 32)))
    for rank, names in ((1, {"b.png"}), (0, {"a.png", "b.png", "c.png"})):
        write_pseudo_masks(tmp_path, CellClassifier("gap"), images, TrainConfig(), CPU, Processes(rank, 2))
        assert {file.name for file in (tmp_path / "deep").iterdir()} == names


def test_the_error_names_a_damaged_mask(tmp_path: Path) -> None:
    images = crop_images(tmp_path / "data", {"a": (32, 32)})
    write_pseudo_masks(tmp_path, CellClassifier("gap"), images, TrainConfig(), CPU, ALONE)
    (tmp_path / "deep" / "a.png").write_bytes(b"no picture")
    with pytest.raises(TrainError, match=r"a\.png: the pseudo mask cannot be read .*; delete it"):
        read_pseudo_masks(tmp_path, images, 0, TrainConfig())


def test_maps_by_head_of_several_layers_come_from_the_heads_of_these_layers(tmp_path: Path) -> None:
    images = crop_images(tmp_path, {"a": (64, 64)}, side=64)
    classifier = CellClassifier("area", layers=("middle",))
    labeled(images, [[[True, True, True]]])
    config = TrainConfig(confidence=0.5, layer_weights=(0.0, 0.4, 0.6))
    masks_LHW = pseudo_masks_of_image(classifier, images, 0, config, CPU)
    probs_LKHW = class_probabilities(classifier, images.rgb(0), TrainConfig(), CPU, ("middle", "deep"))
    assert masks_LHW.shape == (2, 64, 64)
    for mask_HW, probs_KHW in zip(masks_LHW, probs_LKHW, strict=True):
        unsure_HW = probs_KHW.max(axis=0) < 0.5
        np.testing.assert_array_equal(mask_HW, np.where(unsure_HW, IGNORED, probs_KHW.argmax(axis=0)))
    assert not np.array_equal(probs_LKHW[0], probs_LKHW[1])
