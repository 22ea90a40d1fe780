"""Multi-label patch classifier: a backbone with three stages and a head from a registry.

A new head is a module with a `weight_KC` property and one entry in `HEADS`.

Shape suffixes: N batch, C channels, K classes, h and w the space of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone, Stages
from models.errors import ArchitectureError


def progressive_dropout_attention(
    deep_NChw: Tensor, weight_KC: Tensor, mu: float, *, normalise: bool = False
) -> Tensor:
    """Return the attention map (N, 1, h, w) of progressive dropout attention, in float32.

    ``M_k = relu(sum_c w_kc m_c)``; ``beta_k = mu * max_xy(M_k)`` per image and class; activations above beta_k are
    dropped to 0; ``A = (1/K) sum_k M^_k`` over the dropped maps of all K classes, absent ones too. Source: Han et al.,
    Medical Image Analysis 2022, equations of section 3.1. With `normalise` each image's map is divided by its own
    maximum, which the paper does not do: the unnormalised product grows with the feature norm and starts near 0 on new
    head weights.
    """
    with torch.autocast(deep_NChw.device.type, enabled=False):
        cam_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float()).relu()
        beta_NK11 = mu * cam_NKhw.amax(dim=(2, 3), keepdim=True)
        dropped_NKhw = torch.where(cam_NKhw > beta_NK11, torch.zeros_like(cam_NKhw), cam_NKhw)
        attention_N1hw = dropped_NKhw.mean(dim=1, keepdim=True)
        if normalise:
            attention_N1hw = attention_N1hw / attention_N1hw.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return attention_N1hw


@dataclass(frozen=True)
class PdaSchedule:
    """How the dropout threshold mu falls with the epochs."""

    sigma: float
    """Factor per epoch."""
    lower: float
    """mu never falls below it."""
    hold: int
    """Epochs that mu stays at 1 before the first decay."""
    start: int
    """First 0-based epoch in which the attention is applied at all."""

    def mu(self, epoch: int) -> float:
        """Return mu in the 0-based epoch: 1 while held, then times sigma each epoch, never below `lower`."""
        return max(self.lower, self.sigma ** max(0, epoch - self.hold + 1))

    def applied(self, epoch: int) -> bool:
        """Tell whether the attention is on in the 0-based epoch."""
        return epoch >= self.start


PDA_SCHEDULES = {
    "paper": PdaSchedule(sigma=0.985, lower=0.65, hold=3, start=0),
    "release": PdaSchedule(sigma=0.98, lower=0.65, hold=1, start=3),
}


class GapHead(nn.Module):
    """Dropout, average pooling and a 1×1 convolution without bias: deep features (N, C, h, w) -> logits (N, K)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor) -> Tensor:
        pooled_NC11 = self.dropout(deep_NChw).mean(dim=(2, 3), keepdim=True)
        logits: Tensor = self.conv(pooled_NC11).flatten(1)
        return logits


class PdaHead(nn.Module):
    """`GapHead` whose training pass weighs the features with progressive dropout attention; evaluation runs without it.

    `mu` is set by the training loop each epoch; None switches the attention off.
    """

    def __init__(self, channels: int, classes: int, *, normalise: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)
        self.mu: float | None = None
        self.normalise = normalise

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor) -> Tensor:
        if self.training and self.mu is not None:
            attention_N1hw = progressive_dropout_attention(deep_NChw, self.weight_KC, self.mu, normalise=self.normalise)
            deep_NChw = attention_N1hw.to(deep_NChw.dtype) * deep_NChw
        pooled_NC11 = self.dropout(deep_NChw).mean(dim=(2, 3), keepdim=True)
        logits: Tensor = self.conv(pooled_NC11).flatten(1)
        return logits


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"gap": GapHead, "pda": PdaHead}


class Classifier(nn.Module):
    """Images (N, 3, H, W), normalised -> logits (N, K), one sigmoid per class; `stages` gives the feature maps for
    CAMs.
    """

    def __init__(self, backbone: str, head: str, classes: int, output_stride: int = 8) -> None:
        super().__init__()
        if head not in HEADS:
            raise ArchitectureError(f"unknown classifier head {head!r}; known are {', '.join(sorted(HEADS))}")
        self.backbone = Backbone(backbone, output_stride)
        self.head: Any = HEADS[head](self.backbone.channels, classes)

    def stages(self, x_NCHW: Tensor) -> Stages:
        """Return the shallow, middle and deep feature maps."""
        stages: Stages = self.backbone(x_NCHW)
        return stages

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(x_NCHW).deep)
        return logits
