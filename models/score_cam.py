"""Score-CAM: channels of a feature map, weighted by the score of the image masked with each of them.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, B pairs of an image and one of
its channels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifier import Classifier
from models.errors import CamUnavailableError

ScoreCamVariant = Literal["official", "torch-cam", "pytorch-grad-cam"]


def score_cam(
    classifier: Classifier,
    x_NCHW: Tensor,
    layer: str = "deep",
    *,
    variant: ScoreCamVariant = "official",
    chunk: int = 32,
) -> Tensor:
    """Return Score-CAM of every class, (N, K, h, w) float32, for a classifier in eval mode.

    At most `chunk` images pass through the network at once. There is no backward pass.

    ``H_c = minmax(up(A_c))``; ``alpha_kc`` is the score of ``X * H_c``; the map is ``relu(sum_c alpha_kc A_c)``.
    Source: Wang et al., CVPR Workshops 2020. Three public versions disagree:

    - `official` (haofanwang/Score-CAM, `cam/scorecam.py`): alpha is the softmax over the **classes**, read at class k.
      Constant channels are left out, so a map without any other channel is 0. The release upsamples before the sum and
      the ReLU. Here both come before the upsampling, which is the same for features after a ReLU.
    - `torch-cam`: softmax over the **channels** of the logit minus that of the unmasked image, a constant that the
      softmax cancels. The min-max comes before the upsampling.
    - `pytorch-grad-cam`: softmax over the **channels** of the logit, upsampling with aligned corners.

    In the last two, a constant channel masks the whole image and keeps the weight of that blank image. Raises
    CamUnavailableError for an unknown variant, and ValueError for a classifier in training mode.
    """
    if variant not in get_args(ScoreCamVariant):
        raise CamUnavailableError(f"unknown Score-CAM {variant!r}; use one of {', '.join(get_args(ScoreCamVariant))}")
    if classifier.training:
        raise ValueError("score_cam needs the classifier in eval mode, as dropout changes the scores; call .eval()")
    with torch.no_grad():
        return torch.cat([_score_cam(classifier, part, layer, variant, chunk) for part in x_NCHW.split(chunk)])


def _score_cam(classifier: Classifier, x_NCHW: Tensor, layer: str, variant: ScoreCamVariant, chunk: int) -> Tensor:
    activation_NChw: Tensor = getattr(classifier.stages(x_NCHW), layer).float()
    varied_NC = activation_NChw.amax(dim=(2, 3)) > activation_NChw.amin(dim=(2, 3))
    images_B, channels_B = varied_NC.nonzero(as_tuple=True)
    # A constant channel masks everything, because its min-max is 0: one blank image gives the score of all of them.
    blank_1K = classifier(torch.zeros_like(x_NCHW[:1])).float()
    logits_NCK = blank_1K.repeat(*varied_NC.shape, 1)
    for start in range(0, len(images_B), chunk):
        image_B, channel_B = images_B[start : start + chunk], channels_B[start : start + chunk]
        mask_B1HW = _masks(activation_NChw[image_B, channel_B][:, None], (x_NCHW.shape[2], x_NCHW.shape[3]), variant)
        logits_NCK[image_B, channel_B] = classifier(x_NCHW[image_B] * mask_B1HW).float()
    if variant == "official":
        weight_NCK = logits_NCK.softmax(dim=2) * varied_NC[:, :, None]
    else:
        weight_NCK = logits_NCK.softmax(dim=1)
    return torch.einsum("nck,nchw->nkhw", weight_NCK, activation_NChw).relu()


def _masks(map_B1hw: Tensor, size_HW: tuple[int, int], variant: ScoreCamVariant) -> Tensor:
    """Return maps scaled to 0–1 at the size of the image. The maps must not be constant."""
    if variant == "torch-cam":
        return F.interpolate(_min_max(map_B1hw), size_HW, mode="bilinear", align_corners=False)
    aligned = variant == "pytorch-grad-cam"
    return _min_max(F.interpolate(map_B1hw, size_HW, mode="bilinear", align_corners=aligned))


def _min_max(map_B1hw: Tensor) -> Tensor:
    low = map_B1hw.amin(dim=(2, 3), keepdim=True)
    high = map_B1hw.amax(dim=(2, 3), keepdim=True)
    return (map_B1hw - low) / (high - low + 1e-8)
