"""The first stages of a bundle's two networks, computed once if both networks have equal ones there.

By default, training freezes the first stages of both backbones, so a classifier and a segmenter of the same
EfficientNet start with the same layers and weights. Only their padding differs: at the edge of a canvas, the classifier
repeats a pixel and the segmenter mirrors its neighbors. Shared stages repeat it. With EfficientNet-Lite0, this reaches
9 px into a canvas, and the margin that is cut off is wider.

Shape suffixes: N batch, C channels, D channels of the deep features, K classes, H and W the image, h and w a map.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.padding import ExtendedConv2d, averages_map
from models.segmenter import NATIVE_STRIDE


class DeepFeatures(nn.Module):
    """The deep features of a classifier, as a network."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x_NCHW: Tensor) -> Tensor:
        stages: Any = self.classifier
        deep_NDhw: Tensor = stages.stages(x_NCHW).deep
        return deep_NDhw


class Networks(NamedTuple):
    """The two networks of a bundle without the first stages that they share, and these stages."""

    first: nn.Module | None
    """Normalized images (N, 3, H, W) -> features (N, C, H/4, W/4); None if the networks share nothing."""
    channels: int
    """C; 3 if the networks share nothing."""
    stride: int
    """4; 1 if the networks share nothing."""
    deep: DeepFeatures
    """The features, or the images if nothing is shared -> the classifier's deep features (N, D, h, w)."""
    segmenter: nn.Module
    """The features, or the images if nothing is shared -> the segmenter's logits (N, K, H/4, W/4)."""


def split_networks(classifier: nn.Module, segmenter: nn.Module, margin: int) -> Networks:
    """Return the networks, cut after the stages up to stride 4 if both have the same layers and weights there.

    The arguments do not change. Only networks of timm with a stem and blocks, such as EfficientNet, are compared. They
    share nothing if padding could reach farther into a canvas than the `margin`, in pixels, that is cut off.
    """
    ours: Any = getattr(getattr(classifier, "backbone", None), "net", None)
    theirs: Any = getattr(getattr(segmenter, "encoder", None), "model", None)
    if not all(hasattr(net, part) for net in (ours, theirs) for part in ("conv_stem", "bn1", "blocks", "feature_info")):
        return Networks(None, 3, 1, DeepFeatures(classifier), segmenter)
    # The decoder reads the features at this stride, so every segmenter has exactly one such stage.
    cut = next(stage for stage in theirs.feature_info.get_dicts() if stage["reduction"] == NATIVE_STRIDE)
    first, other = _first(ours, cut["stage"]), _first(theirs, cut["stage"])
    if not _alike(first, other) or _reach_px(first) > margin:
        return Networks(None, 3, 1, DeepFeatures(classifier), segmenter)
    # Any: networks have their parts by name.
    later_classifier: Any = copy.deepcopy(classifier)
    later_segmenter: Any = copy.deepcopy(segmenter)
    first = _first(later_classifier.backbone.net, cut["stage"])
    for net in (later_classifier.backbone.net, later_segmenter.encoder.model):
        _remove(net, cut["stage"])
    # The features have a quarter of the image's sides, which need not be multiples of the encoder's stride.
    later_segmenter.requires_divisible_input_shape = False
    return Networks(first, int(cut["num_chs"]), NATIVE_STRIDE, DeepFeatures(later_classifier), later_segmenter)


def _first(net: Any, stages: int) -> nn.Module:
    return nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:stages])


def _alike(first: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks have the same layers and weights, except for what their padding adds."""
    ours, theirs = first.state_dict(), other.state_dict()
    # The text of a network has the types, sizes, strides and dilations of its layers.
    return (
        repr(first) == repr(other)
        and _edges(first) == _edges(other)
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def _edges(network: nn.Module) -> list[tuple[tuple[int, int, int, int], tuple[int, int]]]:
    """Return by how many pixels the convolutions extend their input."""
    return [(module.edges, module.multiple) for module in network.modules() if isinstance(module, ExtendedConv2d)]


def _reach_px(first: nn.Module) -> float:
    """Return how many pixels from the edge of an image the padding can change the features; infinity for everywhere."""
    reach_px, stride = 0, 1
    for module in first.modules():
        if not isinstance(getattr(module, "se", nn.Identity()), nn.Identity):
            return math.inf  # squeeze-and-excitation averages the whole image
        if averages_map(getattr(module, "bn1", nn.Identity())):
            return math.inf
        if isinstance(module, ExtendedConv2d):
            reach_px += stride * max(module.edges)
        if isinstance(module, nn.Conv2d):
            stride *= module.stride[0]
    return reach_px


def _remove(net: Any, stages: int) -> None:
    """Replace the stem and the first stages by layers that do nothing, so that `net` takes the stages' output."""
    net.conv_stem, net.bn1 = nn.Identity(), nn.Identity()
    for stage in range(stages):
        net.blocks[stage] = nn.Identity()
