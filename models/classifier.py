"""Multi-label patch classifier: a backbone with three stages and a head from the registry `models.heads.HEADS`.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.backbone import Backbone, Stages
from models.errors import ArchitectureError
from models.heads import HEADS, HeadOutput


class Classifier(nn.Module):
    """Images (N, 3, H, W), normalised -> logits (N, K), one sigmoid per class; `stages` and `head_output` give what
    maps are made of.

    `depth` cuts the backbone, see `Backbone`. Raises ArchitectureError where `backbone` or `head` names nothing.
    """

    def __init__(self, backbone: str, head: str, classes: int, depth: int | None = None) -> None:
        super().__init__()
        if head not in HEADS:
            raise ArchitectureError(f"unknown classifier head {head!r}; known are {', '.join(sorted(HEADS))}")
        self.backbone = Backbone(backbone, depth=depth)
        self.head: Any = HEADS[head](self.backbone.channels, classes)

    def stages(self, x_NCHW: Tensor) -> Stages:
        """Return the shallow, middle and deep feature maps."""
        stages: Stages = self.backbone(x_NCHW)
        return stages

    def head_output(self, stages: Stages, x_NCHW: Tensor) -> HeadOutput:
        """Return logits, map and auxiliary logits for the stages of these images; in training each of
        `auxiliary_NK` gets the loss of the logits too.
        """
        output: HeadOutput = self.head(stages.deep, x_NCHW)
        return output

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head_output(self.stages(x_NCHW), x_NCHW).logits_NK
