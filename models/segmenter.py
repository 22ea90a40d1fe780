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
    """Return DeepLabV3+ with random weights: normalized images (N, 3, H, W) -> logits (N, K, H/4, W/4).

    The encoder stride is 16, the ASPP rates are 6, 12 and 18, and there are 48 low-level channels (Chen et al., ECCV
    2018). `encoder` is a name of segmentation-models-pytorch, or "tu-" and the name of a timm network. The head does
    not upsample, because finer pixels would only be interpolated. Raises ArchitectureError if the encoder is unknown.
    """
    options: dict[str, Any] = {"encoder_output_stride": 16, "decoder_atrous_rates": (6, 12, 18), "upsampling": 1}
    try:
        # smp first builds a timm encoder on the device "meta" to read its channels.
        with WithoutUnseenWeights():
            network: nn.Module = smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=classes, **options)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArchitectureError(f"segmenter encoder {encoder!r} is unknown or unsuitable: {error}") from error
    return network


def logits_at_stride(logits_NKhw: Tensor, output_stride: int) -> Tensor:
    """Return stride-4 logits at stride 1, 2 or 4, upsampled bilinearly with `align_corners=False`.

    Raises ValueError for another stride.
    """
    if output_stride not in (1, 2, NATIVE_STRIDE):
        raise ValueError(f"output stride {output_stride} is not one of 1, 2 and {NATIVE_STRIDE}")
    if output_stride == NATIVE_STRIDE:
        return logits_NKhw
    factor = NATIVE_STRIDE // output_stride
    return F.interpolate(logits_NKhw.float(), scale_factor=float(factor), mode="bilinear", align_corners=False)
