"""Class activation maps of a `Classifier` and the pseudo masks made of them.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w a feature map, L the three layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifier import Classifier


class LayerMaps(NamedTuple):
    """One map (N, K, h, w) per stage of the backbone."""

    shallow: Tensor
    middle: Tensor
    deep: Tensor


def cam(deep_NChw: Tensor, weight_KC: Tensor) -> Tensor:
    """Return the class activation maps ``M_k = sum_c w_kc f_c`` (N, K, h, w), without ReLU. Source: Zhou et al., CVPR
    2016.
    """
    return torch.einsum("nchw,kc->nkhw", deep_NChw.float(), weight_KC.float())


def grad_cam_layers(classifier: Classifier, x_NCHW: Tensor) -> LayerMaps:
    """Return Grad-CAM of every class at the three stages, without the final ReLU, for a classifier in eval mode.

    ``w = mean_xy(d y_k / d A)``, ``cam_k = sum_c w_c A_c`` on the logit before the sigmoid (Selvaraju et al., ICCV
    2017; no ReLU as in the code of Han et al. 2022). A pooled linear head makes the deep stage's Grad-CAM equal to CAM
    / (h w), so it needs no backward pass; the other two take one backward pass per class for the whole batch, since the
    logits of one image do not depend on another.
    """
    if classifier.training:
        raise ValueError(
            "grad_cam_layers needs the classifier in eval mode: dropout and attention change the maps; call .eval()"
        )
    with torch.enable_grad():
        # A leaf that needs a gradient makes autograd record the graph even if every weight is frozen.
        stages = classifier.stages(x_NCHW.detach().requires_grad_())
        logits_NK = classifier.head(stages.deep)
        shallow, middle = [], []
        for k in range(logits_NK.shape[1]):
            last = k == logits_NK.shape[1] - 1
            gradients = torch.autograd.grad(
                logits_NK[:, k].sum(), [stages.shallow, stages.middle], retain_graph=not last
            )
            shallow.append(_weighted_sum(stages.shallow, gradients[0]))
            middle.append(_weighted_sum(stages.middle, gradients[1]))
    deep = cam(stages.deep, classifier.head.weight_KC) / (stages.deep.shape[2] * stages.deep.shape[3])
    return LayerMaps(torch.stack(shallow, 1).detach(), torch.stack(middle, 1).detach(), deep.detach())


def _weighted_sum(activation_NChw: Tensor, gradient_NChw: Tensor) -> Tensor:
    return (gradient_NChw.mean(dim=(2, 3), keepdim=True) * activation_NChw).sum(dim=1)


def pseudo_masks(maps: LayerMaps, present_NK: Tensor, size_HW: tuple[int, int]) -> Tensor:
    """Return the label of each pixel from each layer's maps, (N, L=3, H, W) uint8, for bool patch labels `present_NK`.

    Bilinear upsampling, one joint min-max over all classes of a patch, absent classes to 0, argmax.
    Present classes win ties, so a patch with a single label is solid. Raises ValueError where a patch has no label at
    all.
    """
    if not bool(present_NK.any(dim=1).all()):
        raise ValueError("every patch needs at least one present class to make a pseudo mask")
    layers = []
    for map_NKhw in maps:
        up_NKHW = F.interpolate(map_NKhw, size=size_HW, mode="bilinear", align_corners=False)
        low = up_NKHW.amin(dim=(1, 2, 3), keepdim=True)
        span = (up_NKHW.amax(dim=(1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
        scaled_NKHW = (up_NKHW - low) / span
        # -1 rather than 0 for an absent class: the same argmax, but a tie at 0 cannot fall to it.
        layers.append(scaled_NKHW.masked_fill(~present_NK[:, :, None, None], -1.0).argmax(dim=1).to(torch.uint8))
    return torch.stack(layers, dim=1)
