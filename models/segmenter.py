"""Segmentation network: DeepLabV3+ with logits at its native output stride.

Shape suffixes: N batch, K classes, H and W the image, h and w the map at the output stride.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ArchitectureError
from models.light_imports import WithoutUnseenWeights, import_light

smp = import_light("segmentation_models_pytorch")

NATIVE_STRIDE = 4


def build_segmenter(encoder: str, classes: int) -> nn.Module:
    """Return DeepLabV3+ with random weights: normalised images (N, 3, H, W) -> logits (N, K, H/4, W/4).

    Encoder stride 16, ASPP rates 6, 12 and 18, 48 low-level channels (Chen et al., ECCV 2018). `encoder`
    is any name that segmentation-models-pytorch knows, "tu-" before a timm name included. The head does not upsample:
    stride 4 holds all it knows. Raises ArchitectureError for an unknown encoder.
    """
    options: dict[str, Any] = {"encoder_output_stride": 16, "decoder_atrous_rates": (6, 12, 18), "upsampling": 1}
    try:
        # smp builds an encoder of timm's on the device "meta" first, to see its channels.
        with WithoutUnseenWeights():
            network: nn.Module = smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=classes, **options)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArchitectureError(f"unknown or unsuited segmenter encoder {encoder!r}: {error}") from error
    return network


def logits_at_stride(logits_NKhw: Tensor, output_stride: int) -> Tensor:
    """Return stride-4 logits at stride 1, 2 or 4, upsampled bilinearly (pixel centres aligned, as
    `align_corners=False`).
    """
    if output_stride not in (1, 2, NATIVE_STRIDE):
        raise ValueError(f"output stride {output_stride} is not one of 1, 2 and {NATIVE_STRIDE}")
    if output_stride == NATIVE_STRIDE:
        return logits_NKhw
    factor = NATIVE_STRIDE // output_stride
    return F.interpolate(logits_NKhw.float(), scale_factor=float(factor), mode="bilinear", align_corners=False)
