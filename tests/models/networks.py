"""Networks with known outputs, in place of trained ones.

`make_card` returns a card with the colors that the color networks recognize, and with identity normalization (mean 0,
std 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Stages
from models.card import NO_DIGEST, ClassifierCard, ModelCard, SegmenterCard, WeightsCard
from models.classifier import Classifier
from models.heads import HeadOutput
from models.segmenter import build_segmenter, share_backbone
from models.tissue_class import TissueClass

RGB = tuple[int, int, int]

LITE = "tf_efficientnet_lite0"


def make_card(
    colors: Sequence[RGB] = ((230, 159, 0), (0, 158, 115)),
    *,
    mpp: float = 1.0,
    gate_window: int = 64,
    margin: int = 32,
    thresholds: Sequence[float] | None = None,
) -> ModelCard:
    """Return a card with classes class-0, class-1, … of those colors, thresholds of 0.5 and normalization to 0–1."""
    return ModelCard(
        schema_version=3,
        name="test",
        description="A network with known outputs.",
        classes=tuple(TissueClass(f"class-{k}", color) for k, color in enumerate(colors)),
        mpp=mpp,
        gate_window=gate_window,
        margin=margin,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        classifier=ClassifierCard(backbone="none", head="gap"),
        segmenter=SegmenterCard(encoder="none", depth=4, rates=(1, 2, 4)),
        output_stride=4,
        gate_thresholds=tuple(thresholds or [0.5] * len(colors)),
        licence="CC0",
        training_data="none",
        metrics={},
        limits="For tests.",
        weights=WeightsCard(classifier=NO_DIGEST, segmenter=NO_DIGEST),
    )


class PixelClassifier(nn.Module):
    """A classifier whose features are the pixels, so that its `forward` sees one gate window at a time."""

    reads_images = True
    class_scores = False

    def stages(self, x_NCHW: Tensor) -> Stages:
        """Return the images as all three stages."""
        return Stages(x_NCHW, x_NCHW, x_NCHW)

    def head_output(self, stages: Stages, x_NCHW: Tensor) -> HeadOutput:
        """Return the logits of the windows."""
        assert stages.deep.shape == x_NCHW.shape
        return HeadOutput(self(x_NCHW), x_NCHW)


class ConstantClassifier(PixelClassifier):
    """Return the same presence probabilities for every window."""

    def __init__(self, presence_K: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("logits_K", torch.logit(torch.tensor(presence_K, dtype=torch.float64)).float())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_K = self.get_buffer("logits_K")
        return logits_K.expand(len(x_NCHW), -1)


class ConstantSegmenter(nn.Module):
    """Return the same logits in every cell of the stride-4 map."""

    def __init__(self, logits_K: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("logits_K", torch.tensor(logits_K, dtype=torch.float32))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        count, _, height, width = x_NCHW.shape
        return self.get_buffer("logits_K").view(1, -1, 1, 1).expand(count, -1, height // 4, width // 4)


class ColorSegmenter(nn.Module):
    """Give each 4×4 cell the class with the color nearest to the cell's mean.

    Logits are minus the scaled distance, for RGB in 0–1.
    """

    def __init__(self, colors: Sequence[RGB], sharpness: float = 40.0) -> None:
        super().__init__()
        self.register_buffer("colors_K3", torch.tensor(colors, dtype=torch.float32) / 255)
        self.sharpness = sharpness

    def forward(self, x_NCHW: Tensor) -> Tensor:
        cells_NChw = F.avg_pool2d(x_NCHW, 4)
        difference = cells_NChw[:, None] - self.get_buffer("colors_K3")[None, :, :, None, None]
        return -self.sharpness * difference.square().sum(dim=2).sqrt()


class ColorClassifier(PixelClassifier):
    """Return a probability near 1 for each class whose color is nearest in some 4×4 cell of the window, else near 0."""

    def __init__(self, colors: Sequence[RGB]) -> None:
        super().__init__()
        self.segmenter = ColorSegmenter(colors)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        winner_Nhw = self.segmenter(x_NCHW).argmax(dim=1)
        classes = len(self.segmenter.get_buffer("colors_K3"))
        present_NK = torch.stack([(winner_Nhw == k).flatten(1).any(dim=1) for k in range(classes)], dim=1)
        return present_NK.float() * 16 - 8


def timm_networks(*, frozen: bool = True, backbone: str = LITE, depth: int | None = 4) -> tuple[Any, Any]:
    """Return a classifier and a segmenter in eval mode; `frozen` ones start with equal weights."""
    torch.manual_seed(0)
    classifier: Any = Classifier(backbone, "gap", 2, depth=depth)
    segmenter: Any = build_segmenter(f"tu-{backbone if frozen else LITE}", 2)
    for module in (*classifier.modules(), *segmenter.modules()):
        if isinstance(module, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type] # a buffer is a tensor here
    if frozen:
        for part in ("conv_stem", "bn1"):
            getattr(segmenter.encoder.model, part).load_state_dict(getattr(classifier.backbone.net, part).state_dict())
        segmenter.encoder.model.blocks[:2].load_state_dict(classifier.backbone.net.blocks[:2].state_dict())
    return classifier.eval(), segmenter.eval()


def vary_decoder(segmenter: Any) -> None:
    """Give the batch norms of a decoder random statistics, and its convolutions random biases.

    In eval mode, fresh batch norms change nothing. The last separable convolution has no bias, because `CoreDecoder`
    requires that.
    """
    for module in segmenter.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
        elif isinstance(module, nn.Conv2d) and module not in segmenter.decoder.block2[0]:
            module.bias = nn.Parameter(0.1 * torch.randn(module.out_channels))


def sharing_networks(
    *, backbone: str = LITE, depth: int = 4, stride: int = 16, edges_too: bool = True
) -> tuple[Any, Any]:
    """Return a classifier and a segmenter with its backbone, in eval mode."""
    torch.manual_seed(0)
    classifier: Any = Classifier(backbone, "gap", 2, depth=depth, stride=stride)
    segmenter = build_segmenter(f"tu-{backbone}", 2, depth, decoder_channels=32, keeps_backbone=edges_too)
    share_backbone(segmenter, classifier)
    return classifier.eval(), segmenter.eval()
