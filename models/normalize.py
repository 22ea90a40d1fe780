"""The input of the networks: RGB bytes, normalized."""

from __future__ import annotations

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
