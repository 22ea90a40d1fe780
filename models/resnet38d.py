"""ResNet-38d, the backbone of Han et al. 2022: a wide pre-activation residual network with dilation from b5 on.

The network is model A1 of Wu et al., "Wider or deeper", 2016. Its structure and parameter names are those of the public
releases of AffinityNet (Ahn and Kwak, CVPR 2018), SEAM and Han et al., so that their published weights can be loaded.

Shape suffixes: N batch, C channels, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT_STRIDE = 8
CHANNELS = 4096

_FROZEN = ("conv1a", "b2", "b2_1", "b2_2")


def _conv(inputs: int, outputs: int, side: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation if side == 3 else 0
    return nn.Conv2d(inputs, outputs, side, stride, padding=padding, dilation=dilation, bias=False)


class ResBlock(nn.Module):
    """``y = shortcut + conv3x3(relu(bn(conv3x3(relu(bn(x))))))``; forward returns (y, relu(bn(x))).

    The shortcut is x if the block keeps channels and resolution, else a 1×1 convolution of relu(bn(x)).
    """

    def __init__(
        self, inputs: int, middle: int, outputs: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.same_shape = inputs == outputs and stride == 1
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, middle, 3, stride=stride, dilation=dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = _conv(middle, outputs, 3, dilation=dilations[1])
        if not self.same_shape:
            self.conv_branch1 = _conv(inputs, outputs, 1, stride=stride)

    def forward(self, x_NChw: Tensor) -> tuple[Tensor, Tensor]:
        active_NChw = F.relu(self.bn_branch2a(x_NChw))
        shortcut_NChw = x_NChw if self.same_shape else self.conv_branch1(active_NChw)
        branch_NChw = self.conv_branch2a(active_NChw)
        branch_NChw = self.conv_branch2b1(F.relu(self.bn_branch2b1(branch_NChw)))
        return shortcut_NChw + branch_NChw, active_NChw


class BottleneckBlock(nn.Module):
    """`ResBlock` with 1×1, dilated 3×3 and 1×1 convolutions to a quarter, a half and all of the output channels.

    Channels are dropped before the second and the third convolution. The shortcut is always a 1×1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, outputs // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = _conv(outputs // 4, outputs // 2, 3, dilation=dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = _conv(outputs // 2, outputs, 1)
        self.conv_branch1 = _conv(inputs, outputs, 1)

    def forward(self, x_NChw: Tensor) -> tuple[Tensor, Tensor]:
        active_NChw = F.relu(self.bn_branch2a(x_NChw))
        branch_NChw = self.conv_branch2a(active_NChw)
        branch_NChw = self.conv_branch2b1(self.dropout_2b1(F.relu(self.bn_branch2b1(branch_NChw))))
        branch_NChw = self.conv_branch2b2(self.dropout_2b2(F.relu(self.bn_branch2b2(branch_NChw))))
        return self.conv_branch1(active_NChw) + branch_NChw, active_NChw


class ResNet38d(nn.Module):
    """Images (N, 3, H, W) -> (b4_5, b5_2, bn7): features of 512, 1024 and 4096 channels at output stride 8.

    As in the releases, a stage is returned after the pre-activation of the block that reads it: b4_5 is the input of b5
    after its first batch norm and ReLU (`conv4` there), b5_2 that of b6 (`conv5`), and bn7 includes the final ReLU. So
    every stage is the input of the next convolution and has no negative values.

    The script of Han et al. that makes pseudo masks taps b4_5 and b5_2 one step earlier, as sums without batch norm and
    ReLU. The class with the largest map agrees with theirs on 77 % and 84 % of the cells.

    Batch norms always use their stored statistics, also after `train()`, and have no gradient. conv1a and the three
    blocks of b2 are frozen. Weights are random; nothing is downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = _conv(3, 64, 3)
        self.b2 = ResBlock(64, 128, 128, stride=2)
        self.b2_1 = ResBlock(128, 128, 128)
        self.b2_2 = ResBlock(128, 128, 128)
        self.b3 = ResBlock(128, 256, 256, stride=2)
        self.b3_1 = ResBlock(256, 256, 256)
        self.b3_2 = ResBlock(256, 256, 256)
        self.b4 = ResBlock(256, 512, 512, stride=2)
        self.b4_1 = ResBlock(512, 512, 512)
        self.b4_2 = ResBlock(512, 512, 512)
        self.b4_3 = ResBlock(512, 512, 512)
        self.b4_4 = ResBlock(512, 512, 512)
        self.b4_5 = ResBlock(512, 512, 512)
        self.b5 = ResBlock(512, 512, 1024, dilations=(1, 2))
        self.b5_1 = ResBlock(1024, 512, 1024, dilations=(2, 2))
        self.b5_2 = ResBlock(1024, 512, 1024, dilations=(2, 2))
        self.b6 = BottleneckBlock(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = BottleneckBlock(2048, CHANNELS, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(CHANNELS)
        for name, module in self.named_modules():
            if name in _FROZEN or isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_NChw = self.conv1a(x_NCHW)
        early: list[Any] = [self.b2, self.b2_1, self.b2_2, self.b3, self.b3_1, self.b3_2]
        early += [self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5]
        for block in early:
            x_NChw, _ = block(x_NChw)
        x_NChw, shallow_NChw = self.b5(x_NChw)
        x_NChw, _ = self.b5_1(x_NChw)
        x_NChw, _ = self.b5_2(x_NChw)
        x_NChw, middle_NChw = self.b6(x_NChw)
        x_NChw, _ = self.b7(x_NChw)
        return shallow_NChw, middle_NChw, F.relu(self.bn7(x_NChw))
