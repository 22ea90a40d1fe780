"""Second stage: write pseudo masks of the training images, one palette PNG per layer.

Shape suffixes: N images, K classes, L layers (shallow, middle, deep), B labeled patches, H and W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.cam import LAYERS, cam_maps, layer_maps
from models.classifier import Classifier
from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import IGNORED, background_HW
from pipeline.training.fit import Processes
from pipeline.training.inputs import Scale, as_input, padded
from pipeline.training.patches import PatchImages

BATCH = 16
"""Labeled patches per call of a CAM method."""


def write_pseudo_masks(
    folder: Path,
    classifier: Classifier,
    images: PatchImages,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    progress: Progress | None = None,
) -> None:
    """Write <folder>/<layer>/<name>.png for every image and layer of weight above 0; keep existing files."""
    classifier.eval()
    for index in range(processes.rank, len(images), processes.world):
        files = mask_files(folder, images, index, config)
        if not all(file.is_file() for file in files):
            masks_LHW = pseudo_masks_of_image(classifier, images, index, config, device)
            for file, mask_HW in zip(files, masks_LHW, strict=True):
                _write(file, mask_HW, images)
        if progress is not None:
            progress("pseudo masks", index + 1, len(images))


def mask_files(folder: Path, images: PatchImages, index: int, config: TrainConfig) -> list[Path]:
    """Return the pseudo mask files of an image, one per layer of weight above 0."""
    name = images.samples[index].name + ".png"  # with_suffix would cut a name that contains a dot
    return [folder / layer / name for layer, weight in zip(LAYERS, config.layer_weights, strict=True) if weight > 0]


def read_pseudo_masks(folder: Path, images: PatchImages, index: int, config: TrainConfig) -> NDArray[np.uint8]:
    """Return the pseudo masks (L, H, W) of an image: class indices, or `IGNORED` for pixels without a label."""
    # Not cached: all masks of a large data set take gigabytes, and reading a PNG takes a millisecond.
    layers = []
    for file in mask_files(folder, images, index, config):
        try:
            with Image.open(file) as image:
                layers.append(np.asarray(image, dtype=np.uint8))
        except OSError as error:
            raise TrainError(f"{file}: the pseudo mask cannot be read ({error}); delete it and start again") from error
    return np.stack(layers)


def pseudo_masks_of_image(
    classifier: Classifier, images: PatchImages, index: int, config: TrainConfig, device: torch.device
) -> NDArray[np.uint8]:
    """Return the pseudo masks (L, H, W) of one image, for the layers of weight above 0.

    A pixel can only have a class that a labeled patch over the pixel contains; see `allowed_classes`. Pixels without an
    allowed class, and background by the data set's rule, are `IGNORED`.
    """
    rgb_HWC = images.rgb(index)
    allowed_KHW = allowed_classes(
        images.boxes[index], images.present[index], rgb_HWC.shape[:2], overlap=config.overlap_labels
    )
    if config.cam == "head":
        used = [layer for layer, weight in zip(LAYERS, config.layer_weights, strict=True) if weight > 0]
        maps_LKHW = class_probabilities(classifier, rgb_HWC, config, device, used)
        # If the labels allow only one class, the pixel is certain whatever the network predicts.
        maps_LKHW[:, :, allowed_KHW.sum(axis=0) == 1] = 1.0
        unsure_LHW = np.where(allowed_KHW, maps_LKHW, 0).max(axis=1) < config.confidence
    else:
        maps_LKHW = _maps_of_patches(classifier, images, index, config, device)
        unsure_LHW = np.zeros((len(maps_LKHW), *rgb_HWC.shape[:2]), dtype=bool)
    # -1 excludes a class that is not allowed even if all others are 0.
    masks_LHW: NDArray[np.uint8] = np.where(allowed_KHW, maps_LKHW, -1.0).argmax(axis=1).astype(np.uint8)
    ignored_HW = ~allowed_KHW.any(axis=0)
    rule = images.dataset.card.background
    if rule is not None:
        ignored_HW |= background_HW(rgb_HWC, rule)
    masks_LHW[unsure_LHW | ignored_HW] = IGNORED
    return masks_LHW


def allowed_classes(
    boxes_B4: NDArray[np.int64], present_BK: NDArray[np.bool_], size_HW: tuple[int, ...], *, overlap: bool
) -> NDArray[np.bool_]:
    """Return which classes each pixel can have, (K, H, W), from the labels of the patches that cover the pixel.

    Without `overlap`, these are the classes of any covering patch. With `overlap`, they are the classes of every
    covering patch, because a class that is absent from a patch is absent from all its pixels. Labels with a minimum
    share can leave no class that way; then the classes of any covering patch are allowed.
    """
    counts_KHW = np.zeros((present_BK.shape[1], *size_HW), dtype=np.int32)
    covering_HW = np.zeros(size_HW, dtype=np.int32)
    for (x, y, width, height), present_K in zip(boxes_B4.tolist(), present_BK, strict=True):
        rows, columns = slice(y, y + height), slice(x, x + width)
        counts_KHW[:, rows, columns] += present_K[:, None, None]
        covering_HW[rows, columns] += 1
    any_KHW = counts_KHW > 0
    if not overlap:
        return any_KHW
    all_KHW = any_KHW & (counts_KHW == covering_HW)
    return np.where(all_KHW.any(axis=0), all_KHW, any_KHW)


@torch.inference_mode()
def class_probabilities(
    classifier: Classifier,
    rgb_HWC: NDArray[np.uint8],
    scale: Scale,
    device: torch.device,
    layers: Sequence[str] = ("deep",),
) -> NDArray[np.float32]:
    """Return class probabilities (L, K, H, W) of the heads of these layers.

    They are the softmax of each head's class map, averaged over four flips.
    """
    height, width = rgb_HWC.shape[:2]
    x_1CHW = as_input(padded(rgb_HWC[None]), device, scale)
    totals: list[Tensor | float] = [0.0] * len(layers)
    for axes in ((), (2,), (3,), (2, 3)):
        moved_1CHW = x_1CHW.flip(axes)
        stages = classifier.stages(moved_1CHW)
        for n, layer in enumerate(layers):
            map_1Khw = classifier.layer_output(layer, stages, moved_1CHW).map_NKhw.float()
            up_1KHW = F.interpolate(map_1Khw, size=x_1CHW.shape[2:], mode="bilinear", align_corners=False)
            totals[n] = totals[n] + up_1KHW.softmax(dim=1).flip(axes)
    total_LKHW = torch.cat([total for total in totals if isinstance(total, Tensor)])
    probs_LKHW: NDArray[np.float32] = (total_LKHW[:, :, :height, :width] / 4).cpu().numpy()
    return probs_LKHW


def _maps_of_patches(
    classifier: Classifier, images: PatchImages, index: int, config: TrainConfig, device: torch.device
) -> NDArray[np.float32]:
    """Return the maps (L, K, H, W) of the layers of weight above 0.

    The maps of each labeled patch are upsampled and scaled to 0–1 jointly over all classes; absent classes are 0.
    Overlapping patches are averaged. A patch with a single class is 1 everywhere for that class.
    """
    rgb_HWC, boxes_B4, present_BK = images.rgb(index), images.boxes[index], images.present[index]
    used = [n for n, weight in enumerate(config.layer_weights) if weight > 0]
    sums_LKHW = np.zeros((len(used), present_BK.shape[1], *rgb_HWC.shape[:2]), dtype=np.float32)
    count_HW = np.zeros(rgb_HWC.shape[:2], dtype=np.float32)
    several_B = present_BK.sum(axis=1) > 1
    for (x, y, w, h), present_K in zip(boxes_B4[~several_B].tolist(), present_BK[~several_B], strict=True):
        sums_LKHW[:, :, y : y + h, x : x + w] += present_K[:, None, None]
        count_HW[y : y + h, x : x + w] += 1
    boxes_B4, present_BK = boxes_B4[several_B], present_BK[several_B]
    for start in range(0, len(boxes_B4), BATCH):
        boxes = boxes_B4[start : start + BATCH].tolist()
        crops_NHWC = np.stack([rgb_HWC[y : y + h, x : x + w] for x, y, w, h in boxes])
        x_NCHW = as_input(crops_NHWC, device, config)
        if used == [LAYERS.index("deep")]:
            maps = [cam_maps(config.cam, classifier, x_NCHW)]
        else:
            every = layer_maps(config.cam, classifier, x_NCHW)
            maps = [every[layer] for layer in used]
        for row, map_NKhw in enumerate(maps):
            scaled_NKHW = jointly_scaled(map_NKhw, crops_NHWC.shape[1:3]).cpu().numpy()
            scaled_NKHW *= present_BK[start : start + BATCH, :, None, None]
            for (x, y, w, h), scaled_KHW in zip(boxes, scaled_NKHW, strict=True):
                sums_LKHW[row, :, y : y + h, x : x + w] += scaled_KHW
        for x, y, w, h in boxes:
            count_HW[y : y + h, x : x + w] += 1
    sums_LKHW /= np.maximum(count_HW, 1)
    return sums_LKHW


def jointly_scaled(map_NKhw: Tensor, size_HW: tuple[int, ...]) -> Tensor:
    """Return maps upsampled bilinearly to (N, K, H, W) and min-max scaled over all classes of a patch together.

    Scaling is joint over the K classes, as in the code of Han et al. 2022. A constant map becomes 0.
    """
    up_NKHW = F.interpolate(map_NKhw.float(), size=size_HW, mode="bilinear", align_corners=False)
    low_N111 = up_NKHW.amin(dim=(1, 2, 3), keepdim=True)
    span_N111 = up_NKHW.amax(dim=(1, 2, 3), keepdim=True) - low_N111
    return (up_NKHW - low_N111) / span_N111.clamp_min(1e-12)


def _write(file: Path, mask_HW: NDArray[np.uint8], images: PatchImages) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask_HW)
    palette = [channel for spec in images.dataset.card.classes for channel in spec.color]
    palette += [255] * (768 - len(palette))
    picture.putpalette(palette)
    temporary = file.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(file)
