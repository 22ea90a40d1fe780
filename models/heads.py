"""Heads of the patch classifier: what makes logits, and a localisation map, of the deep features.

A new head is a module with `linear_map`, a forward that returns `HeadOutput`, and one entry in `HEADS`.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = 1e-6


class HeadOutput(NamedTuple):
    """What a head makes of a batch."""

    logits_NK: Tensor
    """Before the sigmoid."""
    map_NKhw: Tensor
    """The head's own localisation: class maps (gap, pda, area), sigmoid heatmaps (pcam), or one class-agnostic
    attention (N, 1, h, w) (lfi, abn)."""
    auxiliary_NK: tuple[Tensor, ...] = ()
    """Further logits; training adds the same loss on each."""


def progressive_dropout_attention(
    deep_NChw: Tensor, weight_KC: Tensor, mu: float, *, normalise: bool = False
) -> Tensor:
    """Return the attention map (N, 1, h, w) of progressive dropout attention, in float32 also under autocast.

    ``M_k = relu(sum_c w_kc m_c)``; ``beta_k = mu * max_xy(M_k)`` per image and class; activations above beta_k are
    dropped to 0; ``A = (1/K) sum_k M^_k`` over the dropped maps of all K classes, absent ones too. Source: Han et al.,
    Medical Image Analysis 2022, equations of section 3.1.

    With `normalise`, which the paper does not do, each image's map is divided by its own maximum, since the
    unnormalised product grows with the square of the feature norm; and an image whose map is 0 everywhere (no class map
    is above 0 anywhere) keeps its features, since it would give no gradient. Measured on a new head over fixed ImageNet
    features of GlaS crops, SGD of rate 0.1 and momentum 0.9, three seeds: unnormalised, all runs ended at a loss of
    log 2 with maps of 0, with gradient clipping too; normalised, all trained. At rate 0.3 more than half of the maps
    were 0 without the second rule.
    """
    with torch.autocast(deep_NChw.device.type, enabled=False):
        cam_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float()).relu()
        beta_NK11 = mu * cam_NKhw.amax(dim=(2, 3), keepdim=True)
        dropped_NKhw = torch.where(cam_NKhw > beta_NK11, torch.zeros_like(cam_NKhw), cam_NKhw)
        attention_N1hw = dropped_NKhw.mean(dim=1, keepdim=True)
        if not normalise:
            return attention_N1hw
        peak_N111 = attention_N1hw.amax(dim=(2, 3), keepdim=True)
        scaled_N1hw = attention_N1hw / peak_N111.clamp_min(_TINY)
        return torch.where(peak_N111 > 0, scaled_N1hw, torch.ones_like(scaled_N1hw))


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
    """Dropout of channels, average pooling and a 1×1 convolution without bias; the map is CAM, ``sum_c w_kc f_c``.

    Source: Zhou et al., CVPR 2016; dropout as in the release of Han et al. 2022. Single values dropped before the
    pooling would average out.
    """

    linear_map: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(0.5)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # noqa: ARG002  # every head takes both
        return HeadOutput(self.pooled_logits(deep_NChw), self.conv(deep_NChw))

    def pooled_logits(self, deep_NChw: Tensor) -> Tensor:
        """Return the logits (N, K) of the features, pooled."""
        pooled_NC11 = self.dropout(deep_NChw).mean(dim=(2, 3), keepdim=True)
        logits_NK: Tensor = self.conv(pooled_NC11).flatten(1)
        return logits_NK


class PdaHead(GapHead):
    """`GapHead` whose training pass weighs the features with progressive dropout attention; evaluation runs without it.

    `mu` is set by the training loop each epoch; None switches the attention off. The map is that of the features
    without attention.
    """

    def __init__(self, channels: int, classes: int, *, normalise: bool = True) -> None:
        super().__init__(channels, classes)
        self.mu: float | None = None
        self.normalise = normalise

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:
        if not self.training or self.mu is None:
            return super().forward(deep_NChw, x_NCHW)
        attention_N1hw = progressive_dropout_attention(deep_NChw, self.weight_KC, self.mu, normalise=self.normalise)
        attended_NChw = attention_N1hw.to(deep_NChw.dtype) * deep_NChw
        return HeadOutput(self.pooled_logits(attended_NChw), self.conv(deep_NChw))


class AreaHead(nn.Module):
    """A class is present where it covers a part of the patch: its logit is that of its mean probability in that part.

    ``s = conv1x1(dropout(f)) + b_k``; ``p = softmax_k(s)``, since tissue classes exclude each other in a pixel; the
    logit is that of the mean of the ``ceil(share h w)`` largest p_k. The map is s. Ours: top-k pooling (Durand et al.,
    CVPR 2017) of probabilities that sum to one over the classes.
    """

    linear_map: ClassVar[bool] = True
    share: ClassVar[float] = 0.2
    """Larger than the least share that makes a class present in the labels: a mean over few cells is blurry, see
    docs/decisions/0005.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)
        # All classes alike: the largest of many random probabilities would start near 1 for every class.
        nn.init.normal_(self.conv.weight, std=0.01)
        self.bias_K = nn.Parameter(torch.zeros(classes))

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # noqa: ARG002  # every head takes both
        scores_NKhw = self.conv(self.dropout(deep_NChw)).float() + self.bias_K.float()[:, None, None]
        probs_NKs = scores_NKhw.softmax(dim=1).flatten(2)
        count = math.ceil(self.share * probs_NKs.shape[2])
        covered_NK = probs_NKs.topk(count, dim=2).values.mean(dim=2)
        # torch.logit, to the bit: OpenVINO does not know that operator.
        bounded_NK = covered_NK.clamp(_TINY, 1 - _TINY)
        return HeadOutput((bounded_NK / (1 - bounded_NK)).log(), scores_NKhw)


class PcamHead(nn.Module):
    """Probabilistic class activation map pooling: each class pools the features by its own heatmap.

    ``s = conv1x1(f)``; ``p = sigmoid(s)``; ``v_k = p_k / sum_xy p_k``; ``x_k = sum_xy v_k f``; the logit of class k is
    the same 1×1 convolution on x_k. The map is p. Source: Ye et al., "Weakly supervised lesion localization with
    probabilistic-CAM pooling", 2020. Computed in float32, with an epsilon on the sum.
    """

    linear_map: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, kernel_size=1)

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # noqa: ARG002  # every head takes both
        with torch.autocast(deep_NChw.device.type, enabled=False):
            feature_NChw = deep_NChw.float()
            heat_NKhw = self.conv(feature_NChw).sigmoid()
            share_NKhw = heat_NKhw / (heat_NKhw.sum(dim=(2, 3), keepdim=True) + _TINY)
            pooled_NCK = torch.einsum("nkhw,nchw->nck", share_NKhw, feature_NChw)
            # Class k's weights on what class k pooled.
            assert self.conv.bias is not None
            logits_NK = torch.einsum("nck,kc->nk", pooled_NCK, self.weight_KC) + self.conv.bias
        return HeadOutput(logits_NK, heat_NKhw)


def _minmax(x_NChw: Tensor) -> Tensor:
    """Return each map scaled to 0–1; a flat one becomes 0."""
    low_NC11, high_NC11 = x_NChw.amin(dim=(2, 3), keepdim=True), x_NChw.amax(dim=(2, 3), keepdim=True)
    return (x_NChw - low_NC11) / (high_NC11 - low_NC11).clamp_min(_TINY)


class LfiHead(nn.Module):
    """LFI-CAM: a feature importance network (FIN) learns the weights of an attention map.

    ``F' = minmax_c(F)``; ``g = resize(grey(x))``; ``w = softmax_c(avgpool(FIN(F' g)))``;
    ``att = minmax(relu(sum_c w_c F_c))``; ``logits = fc(GAP(att F + F))``. The map is att, one for all classes.
    Source: Lee et al., ICCV 2021.

    FIN is four 3×3 convolutions with batch norms and ReLU between them; the inner ones have at most 256 channels, the
    width in the authors' code. Grey is the mean of the normalised channels and the resize is bilinear, as there. Their
    code takes the min-max of att over the batch, so that a map depends on its neighbours, and detaches att, so that FIN
    learns nothing; here each image has its own min-max and the gradient flows.
    """

    linear_map: ClassVar[bool] = False

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        inner = min(channels, 256)
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, inner), (inner, inner), (inner, inner), (inner, channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.importance = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(channels, classes)

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:
        feature_NChw = deep_NChw.float()
        grey_N1HW = x_NCHW.float().mean(dim=1, keepdim=True)
        grey_N1hw = F.interpolate(grey_N1HW, deep_NChw.shape[2:], mode="bilinear", align_corners=False)
        importance_NC = self.importance(_minmax(feature_NChw) * grey_N1hw).float().mean(dim=(2, 3)).softmax(dim=1)
        with torch.autocast(deep_NChw.device.type, enabled=False):
            weighted_Nhw = torch.einsum("nchw,nc->nhw", feature_NChw, importance_NC)
        attention_N1hw = _minmax(weighted_Nhw[:, None].relu())
        pooled_NC = ((attention_N1hw + 1) * feature_NChw).mean(dim=(2, 3))
        return HeadOutput(self.fc(pooled_NC), attention_N1hw)


class _Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions, a quarter of the channels within; source: He et al., 2016."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        self.branch = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x_NChw: Tensor) -> Tensor:
        return F.relu(x_NChw + self.branch(x_NChw))


class AbnHead(nn.Module):
    """Attention branch network: an attention branch beside a perception branch, each with logits and loss.

    ``a = relu(bn(conv1x1(stage'(x))))``; ``att = sigmoid(bn(conv3x3(a)))``; auxiliary logits ``GAP(conv1x1(a))``;
    logits ``fc(GAP(stage(x att + x)))``. The map is att, one for all classes. Source: Fukui et al., CVPR 2019.

    The paper splits a ResNet before its last stage, which both branches then own a copy of. Here the split is at the
    end of the backbone, so that any backbone serves, and stage' and stage are one bottleneck block each in the head.
    """

    linear_map: ClassVar[bool] = False

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.attention_stage = _Bottleneck(channels)
        self.class_maps = nn.Sequential(nn.Conv2d(channels, classes, 1, bias=False), nn.BatchNorm2d(classes), nn.ReLU())
        self.attention = nn.Sequential(nn.Conv2d(classes, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        self.attention_logits = nn.Conv2d(classes, classes, 1, bias=False)
        self.perception_stage = _Bottleneck(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:  # noqa: ARG002  # every head takes both
        maps_NKhw = self.class_maps(self.attention_stage(deep_NChw))
        attention_N1hw = self.attention(maps_NKhw)
        perceived_NChw = self.perception_stage(deep_NChw * attention_N1hw + deep_NChw)
        auxiliary_NK = self.attention_logits(maps_NKhw).mean(dim=(2, 3))
        return HeadOutput(self.fc(perceived_NChw.mean(dim=(2, 3))), attention_N1hw, (auxiliary_NK,))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "gap": GapHead,
    "pda": PdaHead,
    "pcam": PcamHead,
    "lfi": LfiHead,
    "abn": AbnHead,
    "area": AreaHead,
}
