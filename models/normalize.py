"""The input of the networks: RGB bytes, normalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def normalized(rgb_NHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Return uint8 images (N, H, W, 3) as the input of a network: ``(rgb / 255 - mean) / std``, (N, 3, H, W) float32.

    All three tensors lie on the same device. The result is channels_last in memory, as permuted NHWC bytes already are.
    """
    # Whole rows of pixels: broadcasting three numbers over each pixel takes five times as long.
    width = rgb_NHWC.shape[2]
    rows_NHR = rgb_NHWC.float().flatten(2)
    # In place: three more arrays for each batch fragment the heap.
    rows_NHR.div_(255.0).sub_(mean_C.repeat(width)).div_(std_C.repeat(width))
    return rows_NHR.view(rgb_NHWC.shape).permute(0, 3, 1, 2)


class OfBytes(nn.Module):
    """A network for RGB bytes: uint8 images (N, H, W, 3) -> its output for the `normalized` images.

    OpenVINO normalizes several pixels at a time while it reads the bytes, to the same bits.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, network: nn.Module, mean_C: Tensor, std_C: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean_C", mean_C)
        self.register_buffer("std_C", std_C)

    def forward(self, rgb_NHWC: Tensor) -> Tensor | tuple[Tensor, ...]:
        jit: Any = torch.jit  # torch does not export `is_tracing` with a type
        if jit.is_tracing():
            # The same operations as in `normalized`, whose rows would have the width of the example in the whole trace.
            unit_NCHW = rgb_NHWC.permute(0, 3, 1, 2).float() / 255.0
            x_NCHW = (unit_NCHW - self.mean_C[:, None, None]) / self.std_C[:, None, None]
        else:
            x_NCHW = normalized(rgb_NHWC, self.mean_C, self.std_C)
        found: Tensor | tuple[Tensor, ...] = self.network(x_NCHW)
        return found
