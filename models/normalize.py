"""The input of the networks: RGB bytes, normalized."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


def byte_table(mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Return the result of `normalized` for each byte in each channel, (3, 256). Both arguments are on the CPU."""
    every_NHWC = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    return normalized(every_NHWC, mean_C, std_C)[0, :, 0].contiguous()


def looked_up(rgb_NHWC: Tensor, table_C256: Tensor) -> Tensor:
    """Return the same values as `normalized` from the model's `byte_table`, (N, 3, H, W) and contiguous. CPU only.

    OpenVINO needs this layout. The lookup takes half the time of `normalized` followed by a copy to this layout.
    """
    rgb, count, (height, width) = rgb_NHWC.numpy(), len(rgb_NHWC), rgb_NHWC.shape[1:3]
    x_NCHW = np.empty((count, 3, height, width), np.float32)
    for n in range(count):
        for c in range(3):
            # A byte is never out of range. The default mode, "raise", would check each index and buffer `out`.
            np.take(table_C256[c].numpy(), rgb[n, :, :, c], out=x_NCHW[n, c], mode="clip")
    return torch.from_numpy(x_NCHW)
