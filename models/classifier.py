"""Multi-label patch classifier: a backbone with three stages and a head from `models.heads.HEADS`.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.backbone import Backbone, Stages
from models.errors import ArchitectureError
from models.heads import HEADS, HeadOutput


class Classifier(nn.Module):
    """Normalized images (N, 3, H, W) -> logits (N, K), one sigmoid per class.

    `stages` and `head_output` return the features and maps that class activation maps are computed from. `depth` cuts
    the backbone, see `Backbone`. Raises ArchitectureError if the backbone or the head is unknown.
    """

    def __init__(self, backbone: str, head: str, classes: int, depth: int | None = None) -> None:
        super().__init__()
        if head not in HEADS:
            raise ArchitectureError(f"unknown classifier head {head!r}; use one of {', '.join(sorted(HEADS))}")
        self.backbone = Backbone(backbone, depth=depth)
        self.head: Any = HEADS[head](self.backbone.channels, classes)

    def stages(self, x_NCHW: Tensor) -> Stages:
        """Return the shallow, middle and deep feature maps."""
        stages: Stages = self.backbone(x_NCHW)
        return stages

    def head_output(self, stages: Stages, x_NCHW: Tensor) -> HeadOutput:
        """Return logits, map and auxiliary logits for the stages of these images.

        Training adds the loss of each of `auxiliary_NK` to that of the logits.
        """
        output: HeadOutput = self.head(stages.deep, x_NCHW)
        return output

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head_output(self.stages(x_NCHW), x_NCHW).logits_NK
