"""How far an image lies from the images that a model was trained on.

Windows of `WINDOW` pixels slide over the classifier's shallow and middle feature maps. The features of a window are the
mean and the standard deviation of each channel. `Statistics` holds mean and covariance of the features of training
windows, and a regression that separates training windows from changed ones (other colors, blur, other pixel sizes).
`Statistics.distances` returns the Mahalanobis distance of other windows, plus the evidence of a change.
docs/benchmarks/familiarity.md compares this with other choices.

Shape suffixes: N images or windows, G sources of training images, C features of a window, E channels of `textures`
(E = C), F terms of a regression, h and w the deep feature map, r and c the rows and columns of windows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from models.errors import WeightsMismatchError

if TYPE_CHECKING:
    # Imports timm, which the statistics do not need.
    from models.backbone import Stages

STEP = 112
"""Distance between windows in model pixels."""

WINDOW = 2 * STEP
"""Side of a window in model pixels."""

FARTHEST = 8.0
"""Whitened features are clipped to this many standard deviations, because the regression also uses their squares."""

PENALTY = 0.01
"""Weight of the squared norm of the regression's coefficients in `fit_changes`."""


def window_starts(length: int) -> list[int]:
    """Return where the windows start along a side of an image of this many pixels, a multiple of the map's stride.

    The last window ends with the image. An image that is smaller than a window is one window.
    """
    last = max(0, length - WINDOW)
    return [*range(0, last, STEP), last]


def textures(stages: Stages) -> Tensor:
    """Return the input (N, E, h, w) of `window_features`, with one value of each channel per cell of the deep map.

    The first half of the channels has the means of all shallow and middle channels over each cell of the deep map, and
    the second half their mean squares. So E is twice the number of these channels.
    """
    side = int(stages.deep.shape[2])

    def over_cells(map_NChw: Tensor) -> Tensor:
        # While torch traces a network, sizes are tensors. OpenVINO needs constant ones.
        return functional.avg_pool2d(map_NChw, int(map_NChw.shape[2]) // side)

    # Squares need more digits than half precision has.
    maps = stages.shallow.float(), stages.middle.float()
    found = torch.cat([over_cells(one) for one in (*maps, *(map_NChw.square() for map_NChw in maps))], dim=1)
    # The channels of a cell side by side, as `models.deep_map.rows_of` and `window_features` read them.
    return found.contiguous(memory_format=torch.channels_last)


def window_features(textures_NEhw: Tensor, stride: int) -> Tensor:
    """Return the features (N, r, c, C) of the windows of `textures`, float32: means, then standard deviations.

    `stride` is the number of model pixels per cell.
    """
    # In the order of the result and of the cells in memory, see `textures`.
    cells_NhwE = textures_NEhw.float().permute(0, 2, 3, 1)
    features_NrcC = _window_means(_window_means(cells_NhwE, 1, stride), 2, stride)
    mean, square = features_NrcC.chunk(2, dim=3)
    square.addcmul_(mean, mean, value=-1).clamp_min_(0).sqrt_()
    return features_NrcC


def _window_means(cells: Tensor, axis: int, stride: int) -> Tensor:
    """Return the means over the windows along an axis with cells of this stride, which divides `STEP`."""
    length, step = cells.shape[axis], STEP // stride
    if length <= 2 * step:
        return cells.mean(dim=axis, keepdim=True)
    # A window is two steps long, so the cells of each step are added once, not for both windows that contain them.
    count = length // step
    steps = cells.narrow(axis, 0, count * step).unflatten(axis, (count, step)).mean(dim=axis + 1)
    # Halfway between two steps: one operation, and each is a launch on a GPU.
    means = torch.lerp(steps.narrow(axis, 0, count - 1), steps.narrow(axis, 1, count - 1), 0.5)
    if length % step == 0:
        return means
    last = cells.narrow(axis, length - 2 * step, 2 * step).mean(dim=axis, keepdim=True)
    return torch.cat([means, last], dim=axis)


@dataclass(frozen=True)
class Changes:
    """A logistic regression that tells changed windows from training windows. All tensors are float32."""

    mean_C: Tensor
    whitening_CC: Tensor
    """Maps features minus the mean into a space in which training windows have about unit covariance."""
    weight_F: Tensor
    """Coefficients of the whitened features z and of ``(z² - 1) / √2``, which has mean 0 and variance 1 if z is
    Gaussian."""
    bias: Tensor
    """A number, shape ()."""
    _of_powers_F: Tensor = field(init=False, repr=False)
    """Coefficients of z and of z², so that a batch needs fewer operations."""
    _constant: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        linear_C, square_C = self.weight_F.chunk(2)
        square_C = square_C / math.sqrt(2)
        object.__setattr__(self, "_of_powers_F", torch.cat([linear_C, square_C]))
        object.__setattr__(self, "_constant", self.bias - square_C.sum())

    def evidence(self, z_NC: Tensor) -> Tensor:
        """Return the evidence (N,) that windows with these whitened features were changed: the logit, at least 0."""
        return self._logits(z_NC).clamp_min(0)

    def logits(self, features_NC: Tensor) -> Tensor:
        """Return the logits (N,) with the current scale."""
        return self._logits((features_NC.float() - self.mean_C) @ self.whitening_CC)

    def _logits(self, z_NC: Tensor) -> Tensor:
        z_NC = _clamped(z_NC)
        return torch.addmv(self._constant, torch.cat([z_NC, z_NC.square()], dim=1), self._of_powers_F)

    def scaled(self, median: float, limit: float) -> Self:
        """Return the regression with another scale: a logit of `median` becomes 1, and one of `limit` becomes 2."""
        factor = 1 / (limit - median)
        return dataclasses.replace(self, weight_F=self.weight_F * factor, bias=(self.bias - median) * factor + 1)


def _clamped(z_NC: Tensor) -> Tensor:
    return z_NC.clamp(-FARTHEST, FARTHEST)


def _terms(z_NC: Tensor) -> Tensor:
    """Return the terms (N, F) of the regression, F = 2 C, as `Changes.weight_F` describes them."""
    z_NC = _clamped(z_NC)
    return torch.cat([z_NC, (z_NC.square() - 1) / math.sqrt(2)], dim=1)


@dataclass(frozen=True)
class Statistics:
    """What familiar windows look like, for each source of images. All tensors are float32."""

    mean_GC: Tensor
    whitening_GCC: Tensor
    """Maps features minus the mean into a space in which their norm is the distance from the source, with the scale of
    `of_sources` and `scaled`."""
    changes: Changes | None = None
    """None until they are fitted."""
    _means_GC: Tensor = field(init=False, repr=False)
    """Those of the sources, then that of `changes`: one product whitens for all of them."""
    _whitenings_GCC: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        more = [] if self.changes is None else [self.changes]
        object.__setattr__(self, "_means_GC", torch.cat([self.mean_GC, *(one.mean_C[None] for one in more)]))
        whitenings_GCC = torch.cat([self.whitening_GCC, *(one.whitening_CC[None] for one in more)])
        object.__setattr__(self, "_whitenings_GCC", whitenings_GCC)

    def distances(self, features_NC: Tensor) -> Tensor:
        """Return the distance (N,) of windows with these features: from the nearest source, plus `Changes.evidence`."""
        z_GNC = torch.bmm(features_NC.float() - self._means_GC[:, None], self._whitenings_GCC)
        nearest_N: Tensor = z_GNC[: len(self.mean_GC)].norm(dim=2).amin(dim=0)
        if self.changes is None:
            return nearest_N
        return nearest_N + self.changes.evidence(z_GNC[-1])

    def scaled(self, factor: float) -> Self:
        """Return the statistics whose distances are multiplied by `factor`, above 0."""
        changes = self.changes
        if changes is not None:
            changes = dataclasses.replace(changes, weight_F=changes.weight_F * factor, bias=changes.bias * factor)
        return dataclasses.replace(self, whitening_GCC=self.whitening_GCC * factor, changes=changes)

    def to(self, device: torch.device) -> Self:
        """Return the statistics on a device."""
        changes = None if self.changes is None else Changes(*(tensor.to(device) for tensor in _tensors(self.changes)))
        return type(self)(self.mean_GC.to(device), self.whitening_GCC.to(device), changes)

    def as_bytes(self) -> bytes:
        """Return the content of the statistics file."""
        tensors = dict(zip(_SOURCES, (self.mean_GC, self.whitening_GCC), strict=True))
        if self.changes is not None:
            tensors |= dict(zip(_CHANGES, _tensors(self.changes), strict=True))
        return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the statistics in a file's content.

        Raises WeightsMismatchError if the tensors are not those, or contain NaN or infinity as float32.
        """
        try:
            tensors = {name: tensor.float() for name, tensor in safetensors.torch.load(content).items()}
            if "mean" in tensors:
                raise WeightsMismatchError(
                    "the statistics of the training windows are those of an earlier version, which measured other "
                    "features; make them again with `wsi-familiarity BUNDLE DATASET --data FOLDER`, or remove "
                    '"familiarity" from model.json to run without warnings about unfamiliar slides'
                )
            mean, whitening = (tensors[name] for name in _SOURCES)
            changes = [tensors[name] for name in _CHANGES] if tensors.keys() & _CHANGES else None
        except (KeyError, safetensors.SafetensorError) as error:
            raise WeightsMismatchError(f"the statistics of the training windows cannot be read: {error}") from error
        # A distance of NaN is below every limit, so that the model would never warn.
        if strange := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise WeightsMismatchError(
                f"the statistics of the training windows contain NaN or infinity in {', '.join(sorted(strange))}; make "
                f"them again with `wsi-familiarity BUNDLE DATASET --data FOLDER`, or download the bundle again"
            )
        if mean.ndim != 2 or not len(mean) or whitening.shape != (*mean.shape, mean.shape[-1]):
            raise WeightsMismatchError(
                f"the statistics of the training windows do not fit together: means of shape "
                f"{tuple(mean.shape)} and a whitening matrix of {tuple(whitening.shape)}"
            )
        read = cls(mean, whitening)
        channels = mean.shape[1]
        expected = ((channels,), (channels, channels), (2 * channels,), ())
        if changes is not None and tuple(tensor.shape for tensor in changes) != expected:
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in _CHANGES)
            raise WeightsMismatchError(
                f"the statistics of changed windows do not fit {channels} channels: the shapes are {shapes}"
            )
        return read if changes is None else dataclasses.replace(read, changes=Changes(*changes))


_SOURCES = ("source_mean", "source_whitening")
"""Names of the tensors of the sources in a file."""

_CHANGES = ("change_mean", "change_whitening", "change_weight", "change_bias")
"""Names of the tensors of `Changes` in a file, in the order of its fields."""


def _tensors(changes: Changes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return changes.mean_C, changes.whitening_CC, changes.weight_F, changes.bias


def of_sources(parts: Sequence[tuple[Statistics, float]]) -> Statistics:
    """Return the statistics of several sources of images, each given with its limit.

    A distance counts in units of the source's limit, and the nearest source counts. `changes` must be None.
    """
    assert all(one.changes is None for one, _ in parts)
    return Statistics(
        torch.cat([one.mean_GC for one, _ in parts]), torch.cat([one.whitening_GCC / limit for one, limit in parts])
    )


def fit_statistics(features_NC: NDArray[np.float32]) -> Statistics:
    """Return the statistics of training windows of one source, at least two, with `shrunk_covariance`."""
    mean_C, whitening_CC = _gaussian(features_NC)
    return Statistics(mean_C[None], whitening_CC[None])


def fit_changes(familiar: Sequence[NDArray[np.float32]], changed: Sequence[Sequence[NDArray[np.float32]]]) -> Changes:
    """Return the regression that tells training windows (N, C) of several sources from changed ones.

    `changed` has, for each kind of change, the windows of each source. Training windows have half of the total weight,
    and all kinds of changes together the other half, in equal parts. Within the training windows and within each kind,
    all sources have the same weight: otherwise the source of a window would tell whether it was changed. The loss is
    the weighted mean of the binary cross-entropy plus half of `PENALTY` times the squared norm of the coefficients
    without the bias. Source of the idea: outlier exposure (Hendrycks et al., ICLR 2019).
    """
    # Imported here because segmenting does not need it.
    from scipy.optimize import minimize
    from scipy.special import expit

    groups = [(0.5, familiar), *((0.5 / len(changed), kind) for kind in changed)]
    weight_N = np.concatenate([np.full(len(part), share / len(of) / len(part)) for share, of in groups for part in of])
    sign_N = np.where(np.arange(len(weight_N)) < sum(map(len, familiar)), -1.0, 1.0)
    mean_C, whitening_CC = _gaussian(np.concatenate(familiar))
    all_NC = torch.from_numpy(np.concatenate([part for _, of in groups for part in of]))
    x_NF = _terms((all_NC - mean_C) @ whitening_CC).double().numpy()

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight_F, bias = values[:-1], values[-1]
        margin_N = sign_N * (x_NF @ weight_F + bias)
        slope_N = -sign_N * weight_N * expit(-margin_N)
        total = weight_N @ np.logaddexp(0, -margin_N) + PENALTY / 2 * weight_F @ weight_F
        return float(total), np.append(x_NF.T @ slope_N + PENALTY * weight_F, slope_N.sum())

    # The loss is strictly convex in the coefficients, so these tolerances only bound the rounding of the result.
    options = {"maxiter": 10_000, "ftol": 1e-14, "gtol": 1e-8}
    start = np.zeros(x_NF.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x.astype(np.float32)
    return Changes(mean_C, whitening_CC, torch.from_numpy(found[:-1]), torch.from_numpy(found[-1:])[0])


def _gaussian(features_NC: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Return the mean (C,) of windows and the matrix (C, C) that whitens them, with `shrunk_covariance`."""
    x_NC = features_NC.astype(np.float64)
    values_C, vectors_CC = np.linalg.eigh(shrunk_covariance(x_NC))
    # A channel that is constant in training would get an infinite weight.
    floor = max(float(values_C[-1]) * 1e-9, float(np.finfo(np.float32).tiny))
    whitening_CC = vectors_CC / np.sqrt(np.maximum(values_C, floor))
    mean_C = x_NC.mean(axis=0)
    return torch.from_numpy(mean_C.astype(np.float32)), torch.from_numpy(whitening_CC.astype(np.float32))


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
