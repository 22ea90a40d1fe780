"""Multi-label patch classifier: a backbone with three stages and a head from `models.heads.HEADS`.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.backbone import STRIDE, Backbone, Stages
from models.errors import ArchitectureError
from models.heads import HEADS, HeadOutput, progressive_dropout_attention
from models.padding import Mode


class Classifier(nn.Module):
    """Normalized images (N, 3, H, W) -> logits (N, K), one sigmoid per class.

    `stages` and `head_output` return the features and maps that class activation maps are computed from. `depth` cuts
    the backbone, `stride` is the stride of its deep stage, and `edges` is how it extends its input; see `Backbone`.
    `layers` are stages ("shallow", "middle") that get a head of their own, for training and pseudo masks only. Raises
    ArchitectureError if the backbone or the head is unknown, or if the backbone cannot have this stride.
    """

    def __init__(
        self,
        backbone: str,
        head: str,
        classes: int,
        depth: int | None = None,
        layers: Sequence[str] = (),
        stride: int = STRIDE,
        edges: Mode = "replicate",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ArchitectureError(f"unknown classifier head {head!r}; use one of {', '.join(sorted(HEADS))}")
        self.backbone = Backbone(backbone, depth, stride, edges)
        self.head: Any = HEADS[head](self.backbone.channels, classes)
        channels = dict(zip(Stages._fields, self.backbone.stage_channels, strict=True))
        self.layer_heads = nn.ModuleDict({layer: HEADS[head](channels[layer], classes) for layer in layers})
        self.reads_images = HEADS[head].reads_images
        """Whether `head_output` in evaluation mode reads the images, which may otherwise be None."""
        self.class_scores = HEADS[head].class_scores
        """Whether the map has class scores, from which `pooled` makes the logits."""
        self.mu: float | None = None
        """Threshold of progressive dropout attention in training mode; None for no attention."""
        self.normalize_attention = True
        """Whether the attention is normalized, which the paper does not do."""

    def stages(self, x_NCHW: Tensor) -> Stages:
        """Return the shallow, middle and deep feature maps."""
        stages: Stages = self.backbone(x_NCHW)
        return stages

    def head_output(self, stages: Stages, x_NCHW: Tensor | None) -> HeadOutput:
        """Return logits, map and auxiliary logits for the stages of these images.

        In training mode, the head reads features weighted by progressive dropout attention if `mu` is set, and the
        logits of the heads of `layers` are among the auxiliary ones. Training adds the loss of each of
        `auxiliary_NK` to that of the logits.
        """
        if not self.training:
            evaluated: HeadOutput = self.head(stages.deep, x_NCHW)
            return evaluated
        output: HeadOutput = self.head(self._attended(stages.deep), x_NCHW)
        more = tuple(self.layer_output(layer, stages, x_NCHW).logits_NK for layer in self.layer_heads)
        return output._replace(auxiliary_NK=output.auxiliary_NK + more)

    def pooled(self, map_NKhw: Tensor) -> Tensor:
        """Return the logits (N, K) of parts of the map of `head_output`, in evaluation mode, if it has class scores."""
        logits_NK: Tensor = self.head.pooled(map_NKhw)
        return logits_NK

    def layer_output(self, layer: str, stages: Stages, x_NCHW: Tensor | None) -> HeadOutput:
        """Return the output of the head of one stage: "deep", or one of the constructor's `layers`."""
        head: Any = self.head if layer == "deep" else self.layer_heads[layer]
        output: HeadOutput = head(getattr(stages, layer), x_NCHW)
        return output

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head_output(self.stages(x_NCHW), x_NCHW).logits_NK

    def _attended(self, deep_NChw: Tensor) -> Tensor:
        if self.mu is None:
            return deep_NChw
        attention_N1hw = progressive_dropout_attention(
            deep_NChw, self.head.weight_KC, self.mu, normalize=self.normalize_attention
        )
        return attention_N1hw.to(deep_NChw.dtype) * deep_NChw
