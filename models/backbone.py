"""Feature extractors from timm behind one interface of three named stages.

Shape suffixes: N batch, C channels, K classes, H and W space, h and w the reduced space of a feature map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from models.errors import ArchitectureError
from models.torchvision_ops import declare_missing_ops

declare_missing_ops()

import timm  # noqa: E402  # torchvision's operators have to be declared first


class Stages(NamedTuple):
    """Feature maps (N, C, h, w) at the output stride, counterparts of ResNet-38d's b4_5, b5_2 and bn7."""

    shallow: Tensor
    middle: Tensor
    deep: Tensor


class Backbone(nn.Module):
    """A timm network without its classifier: images (N, 3, H, W) -> `Stages`, all three at `output_stride` by dilation.

    Shallow and middle are the ends of timm's third- and second-last feature stages, deep is the final feature map,
    after the network's last convolution. Weights are random: nothing is fetched.
    """

    def __init__(self, name: str, output_stride: int = 8) -> None:
        super().__init__()
        if name not in timm.list_models(name):
            raise ArchitectureError(
                f"unknown backbone {name!r}: timm {timm.__version__} has no such model; see timm.list_models()"
            )
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, output_stride=output_stride)
        if not hasattr(net, "forward_intermediates"):
            raise ArchitectureError(
                f"backbone {name!r} has no forward_intermediates in timm {timm.__version__}; take another one"
            )
        self.net = net
        self.channels: int = net.num_features
        self._taps = [len(net.feature_info) - 3, len(net.feature_info) - 2]

    def forward(self, x_NCHW: Tensor) -> Stages:
        network: Any = self.net
        deep, (shallow, middle) = network.forward_intermediates(x_NCHW, indices=self._taps)
        return Stages(shallow, middle, deep)
