"""Heads of the patch classifier: modules that turn the deep features into logits and a localization map.

A new head is one class and its entry in `HEADS`. The class is a module with these parts:

- a constructor that takes the numbers of channels and classes;
- a forward that takes the deep features (N, C, h, w) and the images (N, 3, H, W) and returns a `HeadOutput`;
- `reads_images`: whether the forward reads the images, which may otherwise be None;
- `linear_map`: whether the class map is linear in the features, with weights `weight_KC`, as CAM needs it;
- `averaged`: whether the logits are those weights times the averaged features, so that Grad-CAM needs no backward pass;
- `class_scores`: whether the map holds one score per class, so that a softmax over the classes gives probabilities.
  In evaluation mode, `pooled` of such a head returns the logits (N, K) of a part of an image from its part of the map.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = 1e-6


class HeadOutput(NamedTuple):
    """The output of a head for a batch."""

    logits_NK: Tensor
    """Logits before the sigmoid."""
    map_NKhw: Tensor
    """The head's own localization: class scores (gap, area), heatmaps after a sigmoid (pcam), or one attention
    (N, 1, h, w) for all classes (lfi, abn)."""
    auxiliary_NK: tuple[Tensor, ...] = ()
    """More logits; training adds the loss of each."""


def progressive_dropout_attention(
    deep_NChw: Tensor, weight_KC: Tensor, mu: float, *, normalize: bool = False
) -> Tensor:
    """Return the attention map (N, 1, h, w) of progressive dropout attention, in float32 also under autocast.

    ``M_k = relu(sum_c w_kc m_c)``; ``beta_k = mu * max_xy(M_k)`` per image and class; activations above beta_k are
    dropped to 0; ``A = (1/K) sum_k M^_k`` over the dropped maps of all K classes, absent ones included. Source: Han et
    al., Medical Image Analysis 2022, equations of section 3.1.

    `normalize` adds two rules that the paper does not have. Each image's map is divided by its own maximum, because the
    product of map and features otherwise grows with the square of the feature norm. An image whose map is 0 everywhere
    (no class map is above 0 anywhere) keeps its features, because it would otherwise give no gradient.

    Both rules were measured with a new head over fixed ImageNet features of GlaS crops, SGD of rate 0.1 and momentum
    0.9, three seeds. Without normalization all runs ended at a loss of log 2 with maps of 0, with gradient clipping
    too; with it all runs trained. At rate 0.3 more than half of the maps were 0 without the second rule.
    """
    with torch.autocast(deep_NChw.device.type, enabled=False):
        cam_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float()).relu()
        beta_NK11 = mu * cam_NKhw.amax(dim=(2, 3), keepdim=True)
        dropped_NKhw = torch.where(cam_NKhw > beta_NK11, torch.zeros_like(cam_NKhw), cam_NKhw)
        attention_N1hw = dropped_NKhw.mean(dim=1, keepdim=True)
        if not normalize:
            return attention_N1hw
        peak_N111 = attention_N1hw.amax(dim=(2, 3), keepdim=True)
        scaled_N1hw = attention_N1hw / peak_N111.clamp_min(_TINY)
        return torch.where(peak_N111 > 0, scaled_N1hw, torch.ones_like(scaled_N1hw))


ATTENTIONS = ("none", "pda")
"""What can weight the features before a head with `linear_map` pools them, in training only."""


@dataclass(frozen=True)
class PdaSchedule:
    """How the dropout threshold mu falls over a training of `EPOCHS`; shorter and longer ones are scaled to that."""

    EPOCHS: ClassVar[int] = 20
    """Epochs in Han et al. 2022 and in their code."""

    sigma: float
    """Factor per epoch."""
    lower: float
    """Lower bound of mu."""
    hold: int
    """Epochs in which mu is 1, before the first decay."""
    start: int
    """First 0-based epoch in which the attention is applied."""

    def mu(self, epoch: int, epochs: int) -> float | None:
        """Return mu in a 0-based epoch of `epochs`, or None if the attention is not applied yet.

        It is 1 for `hold` epochs, then times sigma each epoch, never below `lower`. A training of another length than
        `EPOCHS` takes the values at the same shares of its length.
        """
        position = epoch * self.EPOCHS / epochs
        if position < self.start:
            return None
        return float(max(self.lower, self.sigma ** max(0.0, position - self.hold + 1)))


PDA_SCHEDULES = {
    "paper": PdaSchedule(sigma=0.985, lower=0.65, hold=3, start=0),
    "release": PdaSchedule(sigma=0.98, lower=0.65, hold=1, start=3),
}


class GapHead(nn.Module):
    """Drop channels, average over space, and apply a 1×1 convolution without bias; the map is ``sum_c w_kc f_c`` (CAM).

    Source: Zhou et al., CVPR 2016; dropout as in the release of Han et al. 2022. Whole channels are dropped, because
    the pooling would average out the loss of single values.
    """

    reads_images: ClassVar[bool] = False
    linear_map: ClassVar[bool] = True
    averaged: ClassVar[bool] = True
    class_scores: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(0.5)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor | None) -> HeadOutput:  # noqa: ARG002  # every head takes both
        pooled_NC11 = self.dropout(deep_NChw).mean(dim=(2, 3), keepdim=True)
        return HeadOutput(self.conv(pooled_NC11).flatten(1), self.conv(deep_NChw))

    def pooled(self, map_NKhw: Tensor) -> Tensor:
        """Return the logits (N, K) of these maps."""
        return map_NKhw.float().mean(dim=(2, 3))


class AreaHead(nn.Module):
    """Compute the logit of a class from its mean probability over the part of the patch that it covers best.

    ``s = conv1x1(dropout(f)) + b_k``; ``p = softmax_k(s)``, because tissue classes exclude each other in a pixel; the
    logit of class k is ``log(m / (1 - m))``, with m the mean of the ``ceil(share h w)`` largest p_k. The map is s.

    This head is our own: top-k pooling (Durand et al., CVPR 2017) of probabilities that sum to one over the classes.
    """

    reads_images: ClassVar[bool] = False
    linear_map: ClassVar[bool] = True
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = True
    share: ClassVar[float] = 0.2
    """Share of the cells that is averaged. It is larger than the smallest share that makes a class present in the
    labels, because a mean over few cells gives blurry maps (docs/decisions/0005).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.conv = nn.Conv2d(channels, classes, kernel_size=1, bias=False)
        # Small weights give all classes the same start. Otherwise the largest of many random probabilities would be
        # near 1 for every class.
        nn.init.normal_(self.conv.weight, std=0.01)
        self.bias_K = nn.Parameter(torch.zeros(classes))

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor | None) -> HeadOutput:  # noqa: ARG002  # every head takes both
        scores_NKhw = self.conv(self.dropout(deep_NChw)).float() + self.bias_K.float()[:, None, None]
        return HeadOutput(self.pooled(scores_NKhw), scores_NKhw)

    def pooled(self, map_NKhw: Tensor) -> Tensor:
        """Return the logits (N, K) of these maps."""
        probs_NKs = map_NKhw.softmax(dim=1).flatten(2)
        count = math.ceil(self.share * probs_NKs.shape[2])
        covered_NK = _largest(probs_NKs, count).mean(dim=2)
        # The same bits as torch.logit, which OpenVINO does not support.
        bounded_NK = covered_NK.clamp(_TINY, 1 - _TINY)
        return (bounded_NK / (1 - bounded_NK)).log()


def _largest(values_NKs: Tensor, count: int) -> Tensor:
    """Return the largest `count` values of each row, in descending order, as (N, K, count)."""
    if values_NKs.device.type == "cpu" and torch.is_inference_mode_enabled():
        # NumPy sorts the 16 cells of a gate window in a seventh of the time of topk. A run reads thousands of windows.
        return torch.from_numpy(np.sort(values_NKs.numpy(), axis=2)[:, :, : -count - 1 : -1].copy())
    return values_NKs.topk(count, dim=2).values


class PcamHead(nn.Module):
    """Pool the features of each class by the class's own heatmap (probabilistic class activation map pooling).

    ``s = conv1x1(f)``; ``p = sigmoid(s)``; ``v_k = p_k / sum_xy p_k``; ``x_k = sum_xy v_k f``; the logit of class k is
    the same 1×1 convolution on x_k. The map is p. Source: Ye et al., "Weakly supervised lesion localization with
    probabilistic-CAM pooling", 2020. All is computed in float32, with an epsilon on the sum.
    """

    reads_images: ClassVar[bool] = False
    linear_map: ClassVar[bool] = True
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = False

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, kernel_size=1)

    @property
    def weight_KC(self) -> Tensor:
        return self.conv.weight[:, :, 0, 0]

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor | None) -> HeadOutput:  # noqa: ARG002  # every head takes both
        with torch.autocast(deep_NChw.device.type, enabled=False):
            feature_NChw = deep_NChw.float()
            heat_NKhw = self.conv(feature_NChw).sigmoid()
            share_NKhw = heat_NKhw / (heat_NKhw.sum(dim=(2, 3), keepdim=True) + _TINY)
            pooled_NCK = torch.einsum("nkhw,nchw->nck", share_NKhw, feature_NChw)
            assert self.conv.bias is not None
            logits_NK = torch.einsum("nck,kc->nk", pooled_NCK, self.weight_KC) + self.conv.bias
        return HeadOutput(logits_NK, heat_NKhw)


def _minmax(x_NChw: Tensor) -> Tensor:
    """Return each map scaled to 0–1; a constant map becomes 0."""
    low_NC11, high_NC11 = x_NChw.amin(dim=(2, 3), keepdim=True), x_NChw.amax(dim=(2, 3), keepdim=True)
    return (x_NChw - low_NC11) / (high_NC11 - low_NC11).clamp_min(_TINY)


class LfiHead(nn.Module):
    """Learn the weights of an attention map with a feature importance network, FIN (LFI-CAM).

    ``F' = minmax_c(F)``; ``g = resize(gray(x))``; ``w = softmax_c(avgpool(FIN(F' g)))``;
    ``att = minmax(relu(sum_c w_c F_c))``; ``logits = fc(GAP(att F + F))``. The map is att, one for all classes.
    Source: Lee et al., ICCV 2021.

    FIN is four 3×3 convolutions, each with a batch norm, and a ReLU between them. Gray is the mean of the normalized
    channels, and the resize is bilinear. The min-max of att is taken per image, and the gradient flows through att.

    The authors' code at commit 4ba02df does all of that, and differs in two points. Its FIN has the full width of the
    backbone in every convolution (512 × the expansion of the block); here the inner convolutions have at most 256
    channels. It applies a ReLU to the output of FIN before the pooling; here the last batch norm is pooled.
    `ReleasedLfiHead` has their form.
    """

    reads_images: ClassVar[bool] = True
    linear_map: ClassVar[bool] = False
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = False
    widest: ClassVar[float] = 256
    """Most channels of the inner convolutions of FIN."""
    final_relu: ClassVar[bool] = False
    """Whether FIN ends with a ReLU."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        inner = int(min(channels, self.widest))
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, inner), (inner, inner), (inner, inner), (inner, channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.importance = nn.Sequential(*(layers if self.final_relu else layers[:-1]))
        self.fc = nn.Linear(channels, classes)

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor) -> HeadOutput:
        feature_NChw = deep_NChw.float()
        gray_N1HW = x_NCHW.float().mean(dim=1, keepdim=True)
        gray_N1hw = F.interpolate(gray_N1HW, deep_NChw.shape[2:], mode="bilinear", align_corners=False)
        importance_NC = self.importance(_minmax(feature_NChw) * gray_N1hw).float().mean(dim=(2, 3)).softmax(dim=1)
        with torch.autocast(deep_NChw.device.type, enabled=False):
            weighted_Nhw = torch.einsum("nchw,nc->nhw", feature_NChw, importance_NC)
        attention_N1hw = _minmax(weighted_Nhw[:, None].relu())
        pooled_NC = ((attention_N1hw + 1) * feature_NChw).mean(dim=(2, 3))
        return HeadOutput(self.fc(pooled_NC), attention_N1hw)


class ReleasedLfiHead(LfiHead):
    """`LfiHead` in the form of its authors' code at commit 4ba02df: FIN of full width, with a ReLU at its end."""

    widest: ClassVar[float] = math.inf
    final_relu: ClassVar[bool] = True


class _Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions with a quarter of the channels inside (He et al., 2016)."""

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
    """Classify by two branches, attention and perception, each with its own logits and loss (attention branch network).

    ``a = relu(bn(conv1x1(stage'(x))))``; ``att = sigmoid(bn(conv3x3(a)))``; auxiliary logits ``GAP(conv1x1(a))``;
    logits ``fc(GAP(stage(x att + x)))``. The map is att, one for all classes. Source: Fukui et al., CVPR 2019.

    Two points differ. The paper splits a ResNet before its last stage, and each branch has its own copy of that stage;
    here the split is at the end of the backbone, so that any backbone works, and stage' and stage are one bottleneck
    block each in the head. The authors' code has another batch norm, `bn_att`, after stage'; this head has none.
    """

    reads_images: ClassVar[bool] = False
    linear_map: ClassVar[bool] = False
    averaged: ClassVar[bool] = False
    class_scores: ClassVar[bool] = False

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.attention_stage = _Bottleneck(channels)
        self.class_maps = nn.Sequential(nn.Conv2d(channels, classes, 1, bias=False), nn.BatchNorm2d(classes), nn.ReLU())
        self.attention = nn.Sequential(nn.Conv2d(classes, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        self.attention_logits = nn.Conv2d(classes, classes, 1, bias=False)
        self.perception_stage = _Bottleneck(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, deep_NChw: Tensor, x_NCHW: Tensor | None) -> HeadOutput:  # noqa: ARG002  # every head takes both
        maps_NKhw = self.class_maps(self.attention_stage(deep_NChw))
        attention_N1hw = self.attention(maps_NKhw)
        perceived_NChw = self.perception_stage(deep_NChw * attention_N1hw + deep_NChw)
        auxiliary_NK = self.attention_logits(maps_NKhw).mean(dim=(2, 3))
        return HeadOutput(self.fc(perceived_NChw.mean(dim=(2, 3))), attention_N1hw, (auxiliary_NK,))


class Head(Protocol):
    """A class of heads: see the top of this file."""

    @property
    def reads_images(self) -> bool: ...

    @property
    def linear_map(self) -> bool: ...

    @property
    def averaged(self) -> bool: ...

    @property
    def class_scores(self) -> bool: ...

    def __call__(self, channels: int, classes: int, /) -> nn.Module: ...


HEADS: dict[str, Head] = {
    "gap": GapHead,
    "pcam": PcamHead,
    "lfi": LfiHead,
    "lfi-release": ReleasedLfiHead,
    "abn": AbnHead,
    "area": AreaHead,
}
"""All heads by name: (channels, classes) -> head."""
