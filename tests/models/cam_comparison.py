"""Comparison of class activation maps with those of public libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.classifier import Classifier

CLASSES = 3


def module(classifier: Classifier, layer: str) -> nn.Module:
    """Return the module of a stage, which torch-cam and pytorch-grad-cam hook."""
    net = classifier.backbone.net
    modules: dict[str, nn.Module] = {"shallow": net.layer2, "middle": net.layer3, "deep": net.layer4}
    return modules[layer]


def assert_close(ours: Tensor, expected: Tensor | NDArray[np.float32]) -> None:
    """Assert equality up to 1e-4 of the value, or 1e-5 of the largest value of the map if terms cancel."""
    wanted = torch.as_tensor(expected)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def their_map(theirs: Any, x_NCHW: Tensor, layer: nn.Module, k: int) -> NDArray[np.float32]:
    """Return the map of class k by pytorch-grad-cam, before its ReLU, min-max and resizing."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(k)] * len(x_NCHW)
    logits_NK = theirs.activations_and_grads(x_NCHW)
    if theirs.uses_gradients:
        sum(target(logit_K) for target, logit_K in zip(targets, logits_NK, strict=True)).backward()
    gradients = [gradient.numpy() for gradient in theirs.activations_and_grads.gradients] or [None]
    activations = theirs.activations_and_grads.activations[0].detach().numpy()
    image: NDArray[np.float32] = theirs.get_cam_image(x_NCHW, layer, targets, activations, gradients[0], False)
    return image
