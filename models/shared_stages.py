"""What both networks of a bundle have in common, which is computed once: the first stages, or the whole backbone.

By default, training freezes the first stages of both backbones, so a classifier and a segmenter of the same
EfficientNet start with the same layers and weights. Only their padding differs: at the edge of a canvas, the classifier
repeats a pixel and the segmenter mirrors its neighbors. Shared stages repeat it. With EfficientNet-Lite0, this reaches
9 px into a canvas, and the margin that is cut off is wider. `models.fine_map` computes these stages, the largest maps
of both networks, once for each pixel of a block.

If the networks share a backbone (`shared_backbone` in the card), both pad in the same way: they repeat edges, or mirror
them if the segmenter trained the backbone (`trains_backbone`). Everything up to the decoder is then shared.

Shape suffixes: N batch, C channels, D channels of the deep features, K classes, H and W the image, h and w a map.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.backbone import Stages
from models.backbone_windows import RING
from models.familiarity import textures
from models.padding import ExtendedConv2d, averages_map
from models.segmenter import NATIVE_STRIDE, CoreDecoder, CoreSegmenter, leaves_margin_out


class DeepFeatures(nn.Module):
    """The deep features of a classifier, as a network. If it is `textured`, it returns them and their `textures`."""

    def __init__(self, classifier: nn.Module, *, textured: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.textured = textured

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        classifier: Any = self.classifier
        stages: Stages = classifier.stages(x_NCHW)
        return (stages.deep, textures(stages)) if self.textured else stages.deep


class Networks(NamedTuple):
    """The two networks of a bundle, and what they share."""

    first: nn.Module | None
    """Normalized images (N, 3, H, W) -> the shared map at stride 4 (N, C, h, w); None if the networks share nothing."""
    reach_px: float
    """Pixels from the edge of an image up to which padding can change this map; infinity for everywhere."""
    start: tuple[int, int]
    """Channels C and stride of what both networks start from: the shared map, or the image if nothing is shared."""
    classifier: nn.Module
    """The classifier whose head reads the deep features."""
    deep: nn.Module
    """The start -> the output of `DeepFeatures`."""
    segmenter: nn.Module
    """The start -> the logits of `CoreSegmenter`. If the whole backbone is shared, a `CoreDecoder` instead, whose deep
    features have the margin and `RING` more pixels."""
    shared_deep: tuple[int, int] | None
    """Channels D and stride of the deep features if the segmenter takes them, else None."""


def unshared(classifier: nn.Module, segmenter: nn.Module, margin: int, *, textured: bool = False) -> Networks:
    """Return the networks without shared stages: each computes all of its features from the images."""
    deep = DeepFeatures(classifier, textured=textured)
    return Networks(None, 0, (3, 1), classifier, deep, CoreSegmenter(segmenter, margin), None)


def split_networks(classifier: nn.Module, segmenter: nn.Module, margin: int, *, textured: bool = False) -> Networks:
    """Return the networks, cut after the last part of the backbones that has the same layers and weights in both.

    The cut is either after all stages or after those up to stride 4. The arguments do not change. `textured` is passed
    to `DeepFeatures`. If the shallow stage that it reads lies before the cut, nothing is shared. Only networks of timm
    with a stem and blocks, such as EfficientNet, are compared. They share no stage whose different padding could reach
    farther into a canvas than the `margin`, in pixels, that is cut off.
    """
    backbone: Any = getattr(classifier, "backbone", None)
    ours: Any = getattr(backbone, "net", None)
    theirs: Any = getattr(getattr(segmenter, "encoder", None), "model", None)
    alone = unshared(classifier, segmenter, margin, textured=textured)
    if not all(hasattr(net, part) for net in (ours, theirs) for part in ("conv_stem", "bn1", "blocks", "feature_info")):
        return alone
    if textured and backbone.shallow_stride < NATIVE_STRIDE:
        return alone
    # The decoder reads the features at this stride, so every segmenter has exactly one such stage.
    cut = next(stage for stage in theirs.feature_info.get_dicts() if stage["reduction"] == NATIVE_STRIDE)
    start = int(cut["num_chs"]), NATIVE_STRIDE
    first, other = _first(ours, cut["stage"]), _first(theirs, cut["stage"])
    reach_px = _reach_px(first)
    shares_all = _share_all(ours, theirs) and leaves_margin_out(segmenter)
    if not shares_all and (not _alike(first, other) or reach_px > margin):
        return alone
    # Any: networks have their parts by name.
    later_classifier: Any = copy.deepcopy(classifier)
    later_segmenter: Any = copy.deepcopy(segmenter)
    first = _first(later_classifier.backbone.net, cut["stage"])
    _remove(later_classifier.backbone.net, cut["stage"])
    deep = DeepFeatures(later_classifier, textured=textured)
    if shares_all:
        last = theirs.feature_info.get_dicts()[-1]
        shared_deep = int(last["num_chs"]), int(last["reduction"])
        decoder = CoreDecoder(later_segmenter, margin + RING)
        return Networks(first, reach_px, start, later_classifier, deep, decoder, shared_deep)
    _remove(later_segmenter.encoder.model, cut["stage"])
    # The features have a quarter of the image's sides, which need not be multiples of the encoder's stride.
    later_segmenter.requires_divisible_input_shape = False
    return Networks(first, reach_px, start, later_classifier, deep, CoreSegmenter(later_segmenter, margin), None)


def _share_all(ours: Any, theirs: Any) -> bool:
    """Return whether two networks are the same, and the classifier's has no layer after the stages."""
    whole, other = (_first(net, len(net.blocks)) for net in (ours, theirs))
    ends = (getattr(ours, part, nn.Identity()) for part in ("conv_head", "bn2"))
    return all(isinstance(end, nn.Identity) for end in ends) and _modes(whole) == _modes(other) and _alike(whole, other)


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


def _modes(network: nn.Module) -> list[str]:
    """Return how the convolutions extend their input."""
    return [module.mode for module in network.modules() if isinstance(module, ExtendedConv2d)]


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
