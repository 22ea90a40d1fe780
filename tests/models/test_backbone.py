from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.errors import ArchitectureError


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet38d", (512, 1024, 4096)),
        ("resnet18", (128, 256, 512)),
        ("resnet50", (512, 1024, 2048)),
        ("tf_efficientnet_lite0", (40, 112, 1280)),
        ("efficientnet_b0", (40, 112, 1280)),
        ("convnext_atto", (80, 160, 320)),
        ("regnetx_002", (56, 152, 368)),
    ],
)
def test_three_stages_have_output_stride_8(name: str, channels: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
        stages = backbone(torch.empty(1, 3, 64, 96))
    assert [tuple(stage.shape) for stage in stages] == [(1, width, 8, 12) for width in channels]
    assert backbone.channels == channels[2]


def test_stages_of_a_timm_network_are_the_outputs_of_its_last_three_layers() -> None:
    backbone = Backbone("resnet18").eval()
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(output)

    for layer in (backbone.net.layer2, backbone.net.layer3, backbone.net.layer4):
        layer.register_forward_hook(keep)
    with torch.inference_mode():
        stages = backbone(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(stage, output) for stage, output in zip(stages, seen, strict=True))


def test_batch_norms_of_resnet38d_stay_in_eval_mode_inside_a_backbone() -> None:
    with torch.device("meta"):
        backbone = Backbone("resnet38d").train()
    assert not any(module.training for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9000", "unknown backbone 'resnet9000'; use 'resnet38d' or a name from timm"),
        ("resnet*", r"unknown backbone 'resnet\*'"),
        ("densenet121", "'densenet121' cannot be built with output stride 8"),
        ("vgg11", "'vgg11' cannot be built with output stride 8"),
    ],
)
def test_an_unsuitable_network_is_named(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(ArchitectureError, match=message):
        Backbone(name)
