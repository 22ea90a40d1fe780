"""Feature extractors, ResNet-38d and those of timm, behind one interface of three named stages.

Shape suffixes: N batch, C channels, H and W space, h and w the reduced space of a feature map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from models import resnet38d
from models.errors import ArchitectureError
from models.light_imports import import_light
from models.padding import Mode, extend_edges

timm = import_light("timm")


STRIDE = resnet38d.OUTPUT_STRIDE
"""Pixels per cell of the feature maps in training, and of class activation maps."""


class Stages(NamedTuple):
    """Feature maps (N, C, h, w) at the output stride: b4_5, b5_2 and bn7 of ResNet-38d, or their counterparts."""

    shallow: Tensor
    middle: Tensor
    deep: Tensor


class Backbone(nn.Module):
    """A network without its classifier: images (N, 3, H, W) -> `Stages`, all three at output stride 8 by dilation.

    With a `stride` of 16, the network has the same weights but less dilation. Its deep stage then has only every second
    cell of each row and column, with the same features except near the edges. The features of ResNet-D networks differ,
    because their average pooling is not dilated. A stage that has stride 8 without dilation keeps this stride.

    `channels` are those of the deep stage and `stage_channels` those of all three. `shallow_stride` is that of the
    shallow stage.

    `name` is "resnet38d" or a model of timm. In a timm network, shallow and middle are the outputs of the third-last
    and second-last feature stages, and deep is the final feature map, after the last convolution.

    With `depth` the network ends after that many of timm's feature stages, and the last three of these are the
    `Stages`. Late stages see hundreds of pixels, so their maps smear across thin structures.

    Convolutions repeat edge pixels instead of adding zeros. Mirrored ones (`edges` "reflect") give worse pseudo masks
    (decision 11); a backbone that the segmenter trained has them (decision 7).

    Weights are random; nothing is downloaded. Raises ArchitectureError if no network has this name, or if the network
    does not have these stages at this stride.
    """

    def __init__(self, name: str, depth: int | None = None, stride: int = STRIDE, edges: Mode = "replicate") -> None:
        super().__init__()
        self.net: Any
        self.channels: int
        self.stage_channels: tuple[int, int, int]
        self.shallow_stride: int
        if name == "resnet38d":
            if depth is not None:
                raise ArchitectureError("backbone 'resnet38d' cannot be cut; remove the depth")
            if stride != STRIDE:
                raise ArchitectureError(f"backbone 'resnet38d' has stride {STRIDE}, not {stride}; use stride {STRIDE}")
            self.net, self.channels, self._taps = resnet38d.ResNet38d(), resnet38d.CHANNELS, None
            self.stage_channels = (512, 1024, resnet38d.CHANNELS)
            self.shallow_stride = STRIDE
        else:
            self.net = _timm_network(name, stride)
            self.channels = self.net.num_features
            self._taps = [len(self.net.feature_info) - 3, len(self.net.feature_info) - 2]
            if depth is not None:
                self.channels, self._taps = _cut(self.net, name, depth), [depth - 3, depth - 2, depth - 1]
            shallow, middle = (int(self.net.feature_info[tap]["num_chs"]) for tap in self._taps[:2])
            self.stage_channels = (shallow, middle, self.channels)
            self.shallow_stride = int(self.net.feature_info[self._taps[0]]["reduction"])
        extend_edges(self.net, edges)

    def forward(self, x_NCHW: Tensor) -> Stages:
        if self._taps is None:
            return Stages(*self.net(x_NCHW))
        if len(self._taps) == 3:
            return Stages(*self.net.forward_intermediates(x_NCHW, indices=self._taps, intermediates_only=True))
        deep, (shallow, middle) = self.net.forward_intermediates(x_NCHW, indices=self._taps)
        return Stages(shallow, middle, deep)


def _cut(net: Any, name: str, depth: int) -> int:
    """Remove all layers after the feature stage with this 1-based number, and return the stage's channels."""
    stages = len(net.feature_info)
    if not 3 <= depth <= stages:
        raise ArchitectureError(f"backbone {name!r} has {stages} feature stages: depth is {depth}, use 3 to {stages}")
    channels: int = net.feature_info[depth - 1]["num_chs"]
    net.prune_intermediate_layers([depth - 1], prune_norm=True)
    return channels


def _timm_network(name: str, stride: int) -> Any:
    if name not in timm.list_models(name):
        raise ArchitectureError(
            f"unknown backbone {name!r}; use 'resnet38d' or a name from timm.list_models() of timm {timm.__version__}"
        )
    try:
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, output_stride=stride)
    except (TypeError, AssertionError, NotImplementedError) as error:
        # The families of timm refuse the argument, or its value, with different errors.
        raise ArchitectureError(
            f"backbone {name!r} cannot be built with output stride {stride} in timm "
            f"{timm.__version__}; use one that can be dilated, such as a ResNet, ConvNeXt, RegNet or EfficientNet"
        ) from error
    if not hasattr(net, "forward_intermediates") or len(net.feature_info) < 3:
        raise ArchitectureError(
            f"backbone {name!r} does not have three feature stages (forward_intermediates) in timm {timm.__version__}; "
            "use another one"
        )
    return net
