"""The classifier of a bundle, applied to patches: the presence of its classes, and features to compare patches by.

Shape suffixes: N patches, H and W pixels, K classes, F features.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, load_networks

if TYPE_CHECKING:  # torch takes seconds to load, and most sessions begin without a suggestion
    from models.classifier import Classifier


class Seen(NamedTuple):
    """What a classifier computes from patches."""

    presence_NK: NDArray[np.float32]
    """Probability of each class of the bundle."""
    features_NF: NDArray[np.float32]
    """Means of the deepest feature map over the patch."""


class PatchModel:
    """The classifier of a bundle, on the CPU. Threads may share it. The weights are read at the first use."""

    def __init__(self, bundle: Bundle) -> None:
        self.card = bundle.card
        self.digest = bundle.digest
        self._bundle = bundle
        self._classifier: Classifier | None = None
        self._lock = threading.Lock()

    def see(self, rgb_NHWC: NDArray[np.uint8]) -> Seen:
        """Return the presence and the features of patches. Raises the errors of `load_networks`."""
        import torch

        from models.classifier import Classifier
        from models.compute import loading
        from models.normalize import normalized

        with self._lock, torch.inference_mode():
            if self._classifier is None:
                with loading():
                    classifier = load_networks(self._bundle)[0]
                assert isinstance(classifier, Classifier)
                self._classifier = classifier
            x_NCHW = normalized(
                torch.from_numpy(np.ascontiguousarray(rgb_NHWC)),
                torch.tensor(self.card.mean),
                torch.tensor(self.card.std),
            )
            stages = self._classifier.stages(x_NCHW)
            logits_NK = self._classifier.head_output(stages, x_NCHW).logits_NK
            return Seen(logits_NK.sigmoid().numpy(), stages.deep.mean(dim=(2, 3)).numpy())
