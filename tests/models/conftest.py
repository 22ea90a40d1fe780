"""Random classifiers and images, which the tests of CAM methods share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.classifier import Classifier
from tests.models.cam_comparison import CLASSES


@pytest.fixture(scope="module")
def classifiers() -> Callable[[str], Classifier]:
    """Return a function that makes a random classifier with a head, once for each head."""
    made: dict[str, Classifier] = {}

    def make(head: str) -> Classifier:
        if head not in made:
            torch.manual_seed(3)
            made[head] = Classifier("resnet18", head, CLASSES).eval()
        return made[head]

    return make


@pytest.fixture(scope="module")
def classifier(classifiers: Callable[[str], Classifier]) -> Classifier:
    return classifiers("gap")


@pytest.fixture(scope="module")
def x_NCHW() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def small_NCHW() -> Tensor:
    """Return small images for Score-CAM, which passes each of 128 channels of each image."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
