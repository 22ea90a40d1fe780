"""Segmentation network: DeepLabV3+ with logits at its native output stride.

Shape suffixes: N batch, K classes, H and W the image, h and w the map at the output stride.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ArchitectureError
from models.light_imports import WithoutUnseenWeights, import_light
from models.padding import extend_edges, mirror_edges

smp = import_light("segmentation_models_pytorch")

NATIVE_STRIDE = 4

DEPTH = 4
"""Default number of encoder stages: up to stride 16, without the late stages that see hundreds of pixels."""
RATES = (1, 2, 4)
"""Default dilation rates of the ASPP, in cells of 16 pixels."""
DECODER_CHANNELS = 256
"""Default channels of the ASPP and the decoder (Chen et al., ECCV 2018)."""

RIM = 1
"""Cells of stride 4 around a core that are needed to interpolate the edge of the core."""
AROUND = 16
"""Pixels around a core that the decoder reads: a cell at stride 16, or two at stride 8."""


def build_segmenter(
    encoder: str,
    classes: int,
    depth: int = DEPTH,
    rates: tuple[int, int, int] = RATES,
    decoder_channels: int = DECODER_CHANNELS,
    *,
    keeps_backbone: bool = False,
) -> nn.Module:
    """Return DeepLabV3+ with random weights: normalized images (N, 3, H, W) -> logits (N, K, H/4, W/4).

    H and W are multiples of 32. The encoder has `depth` stages (3 to 5) and a stride of at most 16; 48 low-level
    channels (Chen et al., ECCV 2018). `encoder` is a name of segmentation-models-pytorch, or "tu-" and the name of a
    timm network. The head does not upsample, because finer pixels would only be interpolated.

    A logit depends on the pixels around it, not on its place in the image: the network has no image pooling, padding
    mirrors the edge, and cells are upsampled around their centers. With `keeps_backbone`, the encoder is a classifier's
    backbone that stays as it is: it repeats edge pixels, and `share_backbone` loads its weights. Raises
    ArchitectureError if the encoder is unknown or cannot have this stride.
    """
    options: dict[str, Any] = {
        "encoder_depth": depth,
        "encoder_output_stride": 16,
        "decoder_atrous_rates": rates,
        "decoder_channels": decoder_channels,
        "upsampling": 1,
    }
    try:
        # smp first builds a timm encoder on the device "meta" to read its channels.
        with WithoutUnseenWeights():
            network: Any = smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=classes, **options)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArchitectureError(f"segmenter encoder {encoder!r} is unknown or unsuitable: {error}") from error
    except (AssertionError, TypeError) as error:  # from timm, often without a message, if it cannot be dilated
        raise ArchitectureError(
            f"segmenter encoder {encoder!r} cannot be built with an output stride of 16; use another encoder, such as "
            "tu-tf_efficientnet_lite0"
        ) from error
    _remove_unused_stages(network.encoder)
    _remove_image_pooling(network.decoder.aspp[0])
    network.decoder.up = nn.Upsample(scale_factor=network.decoder.up.scale_factor, mode="bilinear", align_corners=False)
    if keeps_backbone:
        extend_edges(network.encoder, "replicate")
    extend_edges(network, "reflect")
    return cast(nn.Module, network)


class CoreSegmenter(nn.Module):
    """A segmenter that returns the logits of the core of a canvas, and of `RIM` cells around it.

    Only the features at stride 16 need the margin, see `CoreDecoder`. Up to rounding, the logits are those of the whole
    canvas. A network without this decoder computes the whole canvas.
    """

    def __init__(self, segmenter: nn.Module, margin: int) -> None:
        """`margin` is a multiple of 16, at least 16."""
        super().__init__()
        # Any: the parts of a segmenter have no types.
        self.segmenter: Any = segmenter
        self._margin = margin
        self.decoder = CoreDecoder(segmenter, margin) if leaves_margin_out(segmenter) else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.decoder is None:
            return _without_edge(self.segmenter(x_NCHW), self._margin // NATIVE_STRIDE - RIM)
        features: Any = self.segmenter.encoder(x_NCHW)
        fine_NChw = _without_edge(features[2], (self._margin - AROUND) // NATIVE_STRIDE)
        logits_NKhw: Tensor = self.decoder(fine_NChw, features[-1])
        return logits_NKhw


class CoreDecoder(nn.Module):
    """The decoder of a segmenter: features of the encoder at stride 4 and of its last stage -> logits.

    The first map has `AROUND` pixels around the core, the second one `deep_margin`. The logits are those that
    `CoreSegmenter` returns. The decoder works at stride 4, which takes much time, so it leaves the margin out. The
    segmenter is one for which `leaves_margin_out` is true.
    """

    def __init__(self, segmenter: nn.Module, deep_margin: int) -> None:
        """`deep_margin` is a multiple of 16, at least 16."""
        super().__init__()
        # Any: the parts of a segmenter have no types.
        self.decoder: Any = segmenter.decoder
        self.head: Any = segmenter.segmentation_head
        self._deep_margin = deep_margin

    def forward(self, fine_NChw: Tensor, deep_NChw: Tensor) -> Tensor:
        decoder = self.decoder
        scale = int(decoder.up.scale_factor)
        deep_NChw = _aspp_inside(decoder.aspp, deep_NChw, (self._deep_margin - AROUND) // (NATIVE_STRIDE * scale))
        fine_NChw = decoder.block1(fine_NChw)
        # A separable convolution, a batch norm and a ReLU.
        (depthwise, pointwise), *after = decoder.block2
        mixed_NChw = nn.Sequential(*after)(_separable_of_two(depthwise, pointwise, decoder.up(deep_NChw), fine_NChw))
        # Upsampling is wrong in the outer half cell of the deep map.
        return _without_edge(self.head(mixed_NChw), AROUND // NATIVE_STRIDE - 1 - RIM)


def leaves_margin_out(segmenter: nn.Module) -> bool:
    """Return whether `CoreDecoder` can compute the decoder of a segmenter."""
    decoder: Any = getattr(segmenter, "decoder", None)
    if not isinstance(decoder, smp.decoders.deeplabv3.decoder.DeepLabV3PlusDecoder):
        return False
    depthwise, pointwise = decoder.block2[0]
    return (
        depthwise.kernel_size == (3, 3)
        and depthwise.stride == depthwise.dilation == pointwise.kernel_size == pointwise.stride == (1, 1)
        and depthwise.bias is pointwise.bias is None
    )


def _aspp_inside(aspp: Any, deep_NChw: Tensor, cells: int) -> Tensor:
    """Return the output of the ASPP and the separable convolution after it, cropped by `cells` cells on each side.

    A convolution is computed only at the cells that the next one reads, unless it reaches beyond the map. For small
    cores, this reduces the decoder's processor time by up to a third.
    """
    if not cells:
        return cast(Tensor, aspp(deep_NChw))
    pyramid, (depthwise, pointwise), *after = aspp
    branches = []
    for branch in pyramid.convs:
        first, *rest = (layer for layer in branch.modules() if not isinstance(layer, nn.Sequential))
        branches.append(nn.Sequential(*rest)(_convolved_inside(first, deep_NChw, cells - 1)))
    joined_NChw: Tensor = pyramid.project(torch.cat(branches, dim=1))
    inside_NChw: Tensor = nn.Sequential(*after)(pointwise(_convolved_inside(depthwise, joined_NChw, 1)))
    return inside_NChw


def _convolved_inside(convolution: nn.Conv2d, map_NChw: Tensor, cells: int) -> Tensor:
    """Return a convolution of a map, cropped by `cells` cells on each side.

    The convolution has stride 1, and its output has the size of its input. If `cells` is at least its reach, the
    cropped cells are not computed.
    """
    reach = convolution.dilation[0] * (convolution.kernel_size[0] // 2)
    if cells < reach:
        return _without_edge(convolution(map_NChw), cells)
    inside_NChw = _without_edge(map_NChw, cells - reach)
    dilation, groups = convolution.dilation, convolution.groups
    return F.conv2d(inside_NChw, convolution.weight, convolution.bias, dilation=dilation, groups=groups)


def _separable_of_two(depthwise: nn.Conv2d, pointwise: nn.Conv2d, a_NChw: Tensor, b_NChw: Tensor) -> Tensor:
    """Return the separable convolution of two maps as if they were joined along their channels.

    The result has one cell less on each side. Joining and extending would copy the largest maps of the network.
    """
    channels = int(a_NChw.shape[1])
    weight, mix = depthwise.weight, pointwise.weight
    a_NChw = F.conv2d(a_NChw, weight[:channels], groups=channels)
    b_NChw = F.conv2d(b_NChw, weight[channels:], groups=int(b_NChw.shape[1]))
    mixed_NChw = F.conv2d(a_NChw, mix[:, :channels])
    del a_NChw  # in PyTorch, its memory becomes the next map
    return mixed_NChw.add_(F.conv2d(b_NChw, mix[:, channels:]))


def _without_edge(map_NChw: Tensor, cells: int) -> Tensor:
    return map_NChw[:, :, cells:-cells, cells:-cells] if cells else map_NChw


def encoder_network(segmenter: nn.Module) -> nn.Module:
    """Return the network of the encoder that published weights are for. The encoders "tu-…" contain that of timm."""
    encoder = cast(nn.Module, segmenter.encoder)
    return cast(nn.Module, getattr(encoder, "model", encoder))


def share_backbone(segmenter: nn.Module, classifier: nn.Module) -> None:
    """Copy the weights of the classifier's backbone into the segmenter's encoder, which must be the same network.

    Raises ArchitectureError if they are different networks.
    """
    backbone: Any = classifier.backbone
    try:
        encoder_network(segmenter).load_state_dict(backbone.net.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2]
        raise ArchitectureError(
            "the segmenter cannot share the classifier's backbone, because its encoder is another network "
            f"({' '.join(reason).strip()[:120]}…); use the same network with the same number of stages"
        ) from error


def take_backbone(classifier: nn.Module, segmenter: nn.Module) -> None:
    """Copy the weights of the segmenter's encoder into the classifier's backbone, and let it mirror the edges too.

    Both must be the same network.
    """
    backbone: Any = classifier.backbone
    backbone.net.load_state_dict(encoder_network(segmenter).state_dict())
    mirror_edges(backbone.net)


def _remove_unused_stages(encoder: Any) -> None:
    """Remove the stages after the last one that the decoder reads, which timm keeps in its EfficientNets."""
    model: Any = getattr(encoder, "model", None)
    if hasattr(model, "blocks") and hasattr(model, "feature_info"):
        read = [info["stage"] for info in model.feature_info.get_dicts() if "stage" in info]
        model.blocks = model.blocks[: max(read, default=len(model.blocks))]


def _remove_image_pooling(aspp: Any) -> None:
    """Remove the branch that averages the whole image, and its channels in the projection."""
    *kept, _pooling = aspp.convs
    aspp.convs = nn.ModuleList(kept)
    outputs = aspp.project[0].out_channels
    aspp.project[0] = nn.Conv2d(len(kept) * outputs, outputs, kernel_size=1, bias=False)


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
