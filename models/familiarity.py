"""How far an image lies from the images that a model was trained on.

Windows of `WINDOW` pixels slide over the classifier's deep feature map. The features of a window are the means of the
channels. `Statistics` holds mean and covariance of the features of training windows, and `Statistics.distances` returns
the Mahalanobis distance of other windows from them. docs/benchmarks/familiarity.md compares this with other choices.

Shape suffixes: N images or windows, G sources of training images, C channels of the feature map, h and w the feature
map, r and c the rows and columns of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import WeightsMismatchError

WINDOW = 224
"""Side of a window in model pixels."""

STEP = 112
"""Distance between windows in model pixels."""


def window_starts(length: int) -> list[int]:
    """Return where the windows start along a side of an image of this many pixels, a multiple of the map's stride.

    The last window ends with the image. An image that is smaller than a window is one window.
    """
    last = max(0, length - WINDOW)
    return [*range(0, last, STEP), last]


def window_features(deep_NChw: Tensor, stride: int) -> Tensor:
    """Return the features (N, r, c, C) of the windows of a feature map, float32.

    `stride` is the number of model pixels per cell of the map.
    """
    side = WINDOW // stride
    # While torch traces a network, sizes are tensors. OpenVINO needs constant ones.
    rows, columns = ([x // stride for x in window_starts(int(length) * stride)] for length in deep_NChw.shape[2:])
    x_NChw = deep_NChw.float()
    mean_NCrw = torch.stack([x_NChw[:, :, row : row + side].mean(dim=2) for row in rows], dim=2)
    mean_NCrc = torch.stack([mean_NCrw[..., column : column + side].mean(dim=3) for column in columns], dim=3)
    return mean_NCrc.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Statistics:
    """What familiar windows look like, for each source of images. Both tensors are float32."""

    mean_GC: Tensor
    whitening_GCC: Tensor
    """Maps features minus the mean into a space in which the windows of the source have about unit covariance. If there
    are several sources, each matrix is divided by its source's limit, so that distances from different sources are
    comparable."""

    def distances(self, features_NC: Tensor) -> Tensor:
        """Return the Mahalanobis distance (N,) of windows with these features from the nearest source."""
        distance_GN = [
            ((features_NC.float() - mean_C) @ whitening_CC).norm(dim=1)
            for mean_C, whitening_CC in zip(self.mean_GC, self.whitening_GCC, strict=True)
        ]
        return torch.stack(distance_GN).amin(dim=0)

    def to(self, device: torch.device) -> Self:
        """Return the statistics on a device."""
        return type(self)(self.mean_GC.to(device), self.whitening_GCC.to(device))

    def as_bytes(self) -> bytes:
        """Return the content of the statistics file."""
        tensors = {"mean": self.mean_GC.cpu().contiguous(), "whitening": self.whitening_GCC.cpu().contiguous()}
        return safetensors.torch.save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the statistics in a file's content. Raises WeightsMismatchError if the tensors are not those."""
        try:
            tensors = safetensors.torch.load(content)
            mean, whitening = tensors["mean"].float(), tensors["whitening"].float()
        except (KeyError, safetensors.SafetensorError) as error:
            raise WeightsMismatchError(f"the statistics of the training windows cannot be read: {error}") from error
        # Earlier files have one source and no axis for it.
        read = cls(mean[None], whitening[None]) if mean.ndim == 1 else cls(mean, whitening)
        if (
            read.mean_GC.ndim != 2
            or not len(read.mean_GC)
            or read.whitening_GCC.shape != (*read.mean_GC.shape, read.mean_GC.shape[-1])
        ):
            raise WeightsMismatchError(
                f"the statistics of the training windows do not fit together: means of shape "
                f"{tuple(mean.shape)} and a whitening matrix of {tuple(whitening.shape)}"
            )
        return read


def of_sources(parts: Sequence[tuple[Statistics, float]]) -> Statistics:
    """Return the statistics of several sources of images, each given with its limit.

    A distance counts in units of the source's limit, and the nearest source counts.
    """
    return Statistics(
        torch.cat([one.mean_GC for one, _ in parts]), torch.cat([one.whitening_GCC / limit for one, limit in parts])
    )


def fit_statistics(features_NC: NDArray[np.float32]) -> Statistics:
    """Return the statistics of training windows of one source, at least two, with `shrunk_covariance`."""
    x_NC = features_NC.astype(np.float64)
    values_C, vectors_CC = np.linalg.eigh(shrunk_covariance(x_NC))
    # A channel that is constant in training would get an infinite weight.
    floor = max(float(values_C[-1]) * 1e-9, float(np.finfo(np.float32).tiny))
    whitening_CC = vectors_CC / np.sqrt(np.maximum(values_C, floor))
    mean_C = x_NC.mean(axis=0)
    return Statistics(*(torch.from_numpy(array.astype(np.float32))[None] for array in (mean_C, whitening_CC)))


def shrunk_covariance(x_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the covariance (C, C), shrunk toward a multiple of the identity.

    ``S' = (1 - a) S + a (tr S / C) I`` with the ``a`` that minimizes the expected squared error. Source: Ledoit and
    Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, lemmas 3.2 to 3.4.
    """
    count, channels = x_NC.shape
    centered_NC = x_NC - x_NC.mean(axis=0)
    covariance_CC = centered_NC.T @ centered_NC / count
    target_CC = np.trace(covariance_CC) / channels * np.eye(channels)
    distance = np.square(covariance_CC - target_CC).sum()
    # The mean over n of |x_n x_n' - S|², without the matrices of single windows, divided by N.
    spread = (np.square(np.square(centered_NC).sum(axis=1)).mean() - np.square(covariance_CC).sum()) / count
    weight = float(min(spread, distance) / distance) if distance > 0 else 0.0
    shrunk_CC: NDArray[np.float64] = (1 - weight) * covariance_CC + weight * target_CC
    return shrunk_CC
