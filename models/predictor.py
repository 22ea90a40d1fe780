"""The networks of a bundle, applied to canvases: classifier, gate, and segmenter.

A canvas is a large part of a slide. Its core is what remains without the model's margin on all sides. Only the core is
predicted, so that every predicted pixel has real context around it. The segmenter runs only on canvases with a gate
window in which more than one class passes.

Shape suffixes: N canvases, K classes, R rows and C columns of gate windows, M windows, H and W the canvas, h and w the
core at the output stride.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone import Stages
from models.bundle import Bundle, ModelCard, load_networks, load_statistics
from models.devices import Uploads, choose_device, processor_name, to_host
from models.errors import NonFiniteOutputError, RuntimeUnavailableError
from models.familiarity import Statistics, window_features
from models.gate import passing_classes
from models.gate_windows import WindowAxis, cut_windows, gated_mean, placed, window_axis
from models.normalize import normalized
from models.openvino_network import OpenVinoNetwork
from models.runtimes import (
    BATCH_SIZE,
    OUTPUT_STRIDES,
    Compute,
    Precision,
    Runtime,
    RuntimeName,
    check_precision,
    choose_runtime,
    default_batch_size,
)
from models.segmenter import logits_at_stride

log = logging.getLogger(__name__)


Network = Callable[[Tensor], Tensor]
"""Normalized images (N, 3, H, W) -> logits."""

Canvases = NDArray[np.uint8] | Tensor
"""RGB canvases (N, H, W, 3) uint8; H and W are multiples of 32. A tensor must be on the predictor's device."""

Axes = tuple[WindowAxis, WindowAxis]
"""The rows and the columns of the gate windows of one canvas."""

Corner = tuple[int, int]
"""The (x, y) of a core in model pixels of the slide, multiples of 16. Windows are counted from the origin."""

SMALLEST_CORE = 32
"""Smallest side of a core in model pixels. Larger sides are multiples of it."""

_WINDOWS = 256
"""Gate windows that the head of the classifier takes at a time, which bounds its memory."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _nothing() -> None:
    """Do nothing before a batch."""


class Decisions(NamedTuple):
    """What the classifier found in N canvases, on the host."""

    segmented_N: NDArray[np.bool_]
    """Which canvases the segmentation network runs on."""
    distances: list[NDArray[np.float32]] | None = None
    """For each canvas, the distance of its windows (r, c; see `models.familiarity`) from the training data, in units of
    the model's limit; None without statistics."""


class Prediction(NamedTuple):
    """The prediction for the cores of N canvases of one size."""

    probs_NKhw: Tensor
    """float32 on the predictor's device. The sum over the classes is 1; it is less near windows in which no class
    passes, and 0 inside them."""
    segmented_N: NDArray[np.bool_]
    """See `Decisions`."""
    distances_Nrc: NDArray[np.float32] | None = None
    """See `Decisions`."""


def choose_compute(
    *,
    device: str = "auto",
    precision: Precision = "float32",
    runtime: RuntimeName = "torch",
    batch_size: int | None = None,
) -> Compute:
    """Return how this machine computes networks if these settings are requested.

    `device` is resolved by `choose_device` and `runtime` by `choose_runtime`. `batch_size` None stands for
    `default_batch_size`. Raises DeviceUnavailableError, RuntimeUnavailableError, and ValueError for an unknown
    precision or a batch size below 1.
    """
    if precision != "float32" and precision not in _AUTOCAST:
        raise ValueError(f"unknown precision {precision!r}; use float32, bf16 or fp16")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    chosen = choose_device(device)
    return Compute(
        device=str(chosen),
        precision=precision,
        runtime=choose_runtime(runtime, chosen.type, precision),
        batch_size=batch_size or default_batch_size(str(chosen)),
        threads=torch.get_num_threads(),
        processor=processor_name(chosen),
    )


class Predictor:
    """A classifier and a segmenter on one device.

    `lock` guards the device: the caller holds `lock` around `predict`. A canvas's result does not depend on the other
    canvases of its batch, and nothing is random.
    """

    def __init__(
        self,
        card: ModelCard,
        digest: str,
        classifier: nn.Module,
        segmenter: nn.Module,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        runtime: Runtime = "torch",
        batch_size: int = BATCH_SIZE,
        output_stride: int = OUTPUT_STRIDES[0],
        ungated_fallback: bool = False,
        skip_by_gate: bool = True,
        statistics: Statistics | None = None,
    ) -> None:
        """Move both networks to `device` in eval mode.

        `ungated_fallback`: use the ungated softmax if no class passes the gate, instead of 0 for every class.
        `skip_by_gate`: run the segmenter only on canvases whose result it can change; False runs it on all canvases and
        gives the same probabilities. `statistics`: the training windows of the model, whose card has `familiarity`.
        `from_networks` accepts "auto". Raises DeviceUnavailableError,
        RuntimeUnavailableError if OpenVINO cannot take a network, and ValueError for an unknown precision, output
        stride or batch size.
        """
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride is {output_stride}; use 1, 2 or 4")
        compute = choose_compute(device=device, precision=precision, runtime=runtime, batch_size=batch_size)
        self.card = card
        self.digest = digest
        self.device = torch.device(compute.device)
        self.precision = compute.precision
        self.runtime = compute.runtime
        self.batch_size = compute.batch_size
        self.threads = compute.threads
        self.processor = compute.processor
        self.output_stride = output_stride
        self.ungated_fallback = ungated_fallback
        self.skip_by_gate = skip_by_gate
        self.lock = threading.Lock()
        self.on_device = Uploads(self.device)
        self._features = self._prepared(DeepFeatures(classifier))
        self._segmenter = self._prepared(segmenter)
        self._classifier: Any = classifier
        self._statistics = None if statistics is None else statistics.to(self.device)
        self._mean_C = torch.tensor(card.mean).to(self.device)
        self._std_C = torch.tensor(card.std).to(self.device)
        self._thresholds_K = torch.tensor(card.gate_thresholds).to(self.device)

    @classmethod
    def from_networks(
        cls,
        card: ModelCard,
        digest: str,
        classifier: nn.Module,
        segmenter: nn.Module,
        *,
        device: str = "auto",
        runtime: RuntimeName = "torch",
        precision: Precision = "float32",
        batch_size: int | None = None,
        **options: Any,
    ) -> Self:
        """Return a predictor on a device and in a runtime that may be "auto"; `options` are the constructor's.

        If `runtime` is "auto" and OpenVINO cannot take a network, the predictor uses torch and logs a warning. Raises
        RuntimeUnavailableError if the device would emulate the precision: see `check_precision`.
        """
        compute = choose_compute(device=device, precision=precision, runtime=runtime, batch_size=batch_size)
        check_precision(compute.device, precision)
        networks = (classifier, segmenter)
        options |= {"device": compute.device, "precision": precision, "batch_size": compute.batch_size}
        try:
            return cls(card, digest, *networks, runtime=compute.runtime, **options)
        except RuntimeUnavailableError as error:
            if runtime != "auto":
                raise
            log.warning("%s: %s; using torch, which takes longer", card.name, error)
            return cls(card, digest, *networks, runtime="torch", **options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, device: str = "auto", **options: Any) -> Self:
        """Return a predictor with the bundle's networks; `options` are those of `from_networks`.

        Raises what `load_networks` and the constructor raise.
        """
        choose_device(device)  # before the weights are read
        statistics = load_statistics(bundle)
        if statistics is None:
            log.warning(
                "%s: this model has no statistics of its training data, so slides that differ get no warning; add them "
                "with wsi-familiarity",
                bundle.card.name,
            )
        networks = load_networks(bundle)
        return cls.from_networks(bundle.card, bundle.digest, *networks, device=device, statistics=statistics, **options)

    @property
    def compute(self) -> Compute:
        """Return how the networks are computed."""
        return Compute(str(self.device), self.precision, self.runtime, self.batch_size, self.threads, self.processor)

    def presence(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> list[Tensor]:
        """Return the classifier's probabilities (R, C, K) in the gate windows that overlap the core of each canvas.

        Raises NonFiniteOutputError with the indices of the canvases.
        """
        canvases = list(self._checked(rgb_NHWC))
        with torch.inference_mode():
            logits, _ = self._classified(canvases, self._window_axes(canvases, corners), _nothing)
            _check_finite("classifier", *to_host([torch.stack([_finite(logits_RCK) for logits_RCK in logits])]))
            return [logits_RCK.sigmoid() for logits_RCK in logits]

    def logits(self, rgb_NHWC: Canvases) -> Tensor:
        """Return the segmenter's logits in the cores without the gate, (N, K, h, w) float32 on the predictor's device.

        Needs at least one canvas. Raises NonFiniteOutputError.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        with torch.inference_mode():
            logits_NKhw = torch.cat([self._segmented(batch) for batch in canvases_NHWC.split(self.batch_size)])
            _check_finite("segmenter", *to_host([torch.stack([_finite(logits_Khw) for logits_Khw in logits_NKhw])]))
        return logits_NKhw

    def gated(self, logits_Khw: Tensor, presence_RCK: Tensor, corner: Corner) -> Tensor:
        """Return the gated probabilities (K, h, w) of the segmenter's logits in one core, as `predict` does."""
        (axes,) = self._core_axes([logits_Khw.shape[1:]], [corner])
        return gated_mean(logits_Khw, self._allowed(presence_RCK), *axes)

    def predict(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> Prediction:
        """Return gated probabilities for the cores of canvases of one size, each with the corner of its core.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        sides = ((side - 2 * self.card.margin) // self.output_stride for side in canvases_NHWC.shape[1:3])
        probs_NKhw = torch.empty((len(canvases_NHWC), len(self.card.classes), *sides), device=self.device)
        segmented_N, distances = self.predict_into(list(probs_NKhw), list(canvases_NHWC), corners)
        return Prediction(probs_NKhw, segmented_N, None if distances is None else np.stack(distances))

    def predict_into(
        self,
        probs: Sequence[Tensor],
        canvases: Sequence[Tensor],
        corners: Sequence[Corner],
        before_batch: Callable[[], None] = _nothing,
    ) -> Decisions:
        """Write the gated probabilities for the cores of canvases (H, W, 3), which may have different sizes.

        `probs` are (K, h, w) float32 and, like the canvases, on the predictor's device. `before_batch` is called before
        each batch; an error that it raises ends the prediction. The host waits for the device twice: for the decisions
        about all canvases, and at the end.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity.
        """
        with torch.inference_mode():
            axes = self._window_axes(canvases, corners)
            allowed, decisions = self._decided(*self._classified(canvases, axes, before_batch))
            finite_N = torch.ones(len(canvases), dtype=torch.bool, device=self.device)
            # Where the segmenter does not run, no window has a choice, and any logits give the same probabilities.
            no_logits = torch.zeros((len(self.card.classes), 1, 1), device=self.device)
            for batch in _batches(canvases, self.batch_size):
                before_batch()
                chosen = [n for n in batch if decisions.segmented_N[n]]
                found = self._segmented(torch.stack([canvases[n] for n in chosen])) if chosen else ()
                logits = dict(zip(chosen, found, strict=True))
                for n in batch:
                    probs[n].copy_(gated_mean(logits.get(n, no_logits), allowed[n], *axes[n]))
                for n, logits_Khw in logits.items():
                    finite_N[n] = _finite(logits_Khw)
            _check_finite("segmenter", *to_host([finite_N]))
        return decisions

    def _classified(
        self, canvases: Sequence[Tensor], axes: Sequence[Axes], before_batch: Callable[[], None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the classifier's logits (R, C, K) in the windows of each canvas, and the distances (r, c) if known."""
        logits: dict[int, Tensor] = {}
        distances: dict[int, Tensor] = {}
        for batch in _batches(canvases, self.batch_size):
            before_batch()
            x_NCHW = normalized(torch.stack([canvases[n] for n in batch]), self._mean_C, self._std_C)
            with self._autocast():
                deep_NDhw = self._features(x_NCHW)
                for n, deep_Dhw, x_CHW in zip(batch, deep_NDhw, x_NCHW, strict=True):
                    logits[n] = self._window_logits(deep_Dhw, x_CHW, *axes[n])
            if self._statistics is not None and self.card.familiarity is not None:
                features_NrcD = window_features(deep_NDhw, x_NCHW.shape[2] // deep_NDhw.shape[2])
                distances_Nrc = self._statistics.distances(features_NrcD.flatten(0, 2)).view(features_NrcD.shape[:3])
                distances |= zip(batch, distances_Nrc / self.card.familiarity.window_limit, strict=True)
        return [logits[n] for n in sorted(logits)], [distances[n] for n in sorted(distances)]

    def _decided(self, logits: Sequence[Tensor], distances: Sequence[Tensor]) -> tuple[list[Tensor], Decisions]:
        """Return `_allowed` for each canvas and, on the host, what follows from it. This waits for the device."""
        allowed = [self._allowed(logits_RCK.sigmoid()) for logits_RCK in logits]
        contested_N = torch.stack([(allowed_RCK.sum(dim=2) > 1).any() for allowed_RCK in allowed])
        finite_N = torch.stack([_finite(logits_RCK) for logits_RCK in logits])
        contested, finite, *found = to_host([contested_N, finite_N, *distances])
        _check_finite("classifier", finite)
        return allowed, Decisions(contested if self.skip_by_gate else np.ones_like(contested), found or None)

    def _prepared(self, network: nn.Module) -> Network:
        placed = _placed(network, self.device)
        if self.runtime == "openvino":
            return OpenVinoNetwork(placed, 2 * self.card.margin + SMALLEST_CORE, self.precision)
        return placed

    def _allowed(self, presence_RCK: Tensor) -> Tensor:
        """Return which classes may have pixels in each window; with `ungated_fallback`, all classes if none passes."""
        passed_RCK = passing_classes(presence_RCK, self._thresholds_K)
        return passed_RCK | ~passed_RCK.any(dim=2, keepdim=True) if self.ungated_fallback else passed_RCK

    def _window_axes(self, canvases: Sequence[Tensor], corners: Sequence[Corner]) -> list[Axes]:
        """Return the rows and columns of the gate windows of canvases (H, W, 3), by a single copy to the device."""
        margin, stride = self.card.margin, self.output_stride
        return self._core_axes(
            [[(side - 2 * margin) // stride for side in canvas_HWC.shape[:2]] for canvas_HWC in canvases], corners
        )

    def _core_axes(self, sizes_out: Sequence[Sequence[int]], corners: Sequence[Corner]) -> list[Axes]:
        """Return the same for cores of these heights and widths at the output stride."""
        margin, window, stride = self.card.margin, self.card.gate_window, self.output_stride
        axes = placed(
            [
                window_axis(start, stride * length, margin, window, stride)
                for (height, width), (x, y) in zip(sizes_out, corners, strict=True)
                for start, length in ((y, height), (x, width))
            ],
            self.device,
        )
        return list(zip(axes[::2], axes[1::2], strict=True))

    def _window_logits(self, deep_Dhw: Tensor, x_CHW: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
        """Return the logits (R, C, K) of the classifier's head in the windows of one canvas."""
        stride = x_CHW.shape[1] // deep_Dhw.shape[1]
        together = max(1, _WINDOWS // len(columns.starts_R))
        found = []
        for starts_R in rows.starts_R.split(together):
            some = rows._replace(starts_R=starts_R)
            deep_MDhw = cut_windows(deep_Dhw, some, columns, stride)
            # Windows of an image are many times as large as those of the features.
            x_MCHW = cut_windows(x_CHW, some, columns) if self._classifier.reads_images else None
            head_output = self._classifier.head_output(Stages(deep_MDhw, deep_MDhw, deep_MDhw), x_MCHW)
            found.append(head_output.logits_NK.float().unflatten(0, (-1, len(columns.starts_R))))
        return torch.cat(found)

    def _checked(self, rgb_NHWC: Canvases) -> Tensor:
        """Return canvases on the device. Raises ValueError if the array does not contain RGB canvases with a core."""
        if rgb_NHWC.ndim != 4 or rgb_NHWC.shape[3] != 3 or rgb_NHWC.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"expected uint8 RGB canvases (N, H, W, 3), got {rgb_NHWC.dtype} {tuple(rgb_NHWC.shape)}")
        sides = rgb_NHWC.shape[1:3]
        if any(side % 32 or side <= 2 * self.card.margin for side in sides):
            raise ValueError(
                f"canvases have {sides[0]}x{sides[1]} px; sides are multiples of 32 above {2 * self.card.margin}"
            )
        return rgb_NHWC if isinstance(rgb_NHWC, Tensor) else self.on_device(rgb_NHWC)

    def _segmented(self, canvases_NHWC: Tensor) -> Tensor:
        """Return the segmenter's logits in the cores of one batch, divided by the model's temperature."""
        with self._autocast():
            logits_NKhw = self._segmenter(normalized(canvases_NHWC, self._mean_C, self._std_C))
        # Upsampled before the margin is cut off, so that a core's edge is interpolated like its inside.
        logits_NKhw = logits_at_stride(logits_NKhw.float() / self.card.temperature, self.output_stride)
        edge = self.card.margin // self.output_stride
        return logits_NKhw[:, :, edge:-edge, edge:-edge]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "float32" or self.runtime == "openvino":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision])


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    # On the CPU, channels_last takes a third less time for both networks.
    # Any: torch's stubs leave `memory_format` out of Module.to.
    anywhere: Any = network.eval().to(device)
    placed: nn.Module = anywhere.to(memory_format=torch.channels_last)
    return placed


class DeepFeatures(nn.Module):
    """The deep features of a classifier, as a network."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x_NCHW: Tensor) -> Tensor:
        stages: Any = self.classifier
        deep_NDhw: Tensor = stages.stages(x_NCHW).deep
        return deep_NDhw


def _batches(canvases: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """Yield the indices of at most `size` canvases (H, W, 3) of one height and width."""
    shapes = [canvas_HWC.shape[1::-1] for canvas_HWC in canvases]
    for _, alike in groupby(sorted(range(len(canvases)), key=shapes.__getitem__), key=shapes.__getitem__):
        group = list(alike)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _finite(output: Tensor) -> Tensor:
    """Return whether a canvas's output contains neither NaN nor infinity, on the device."""
    return torch.isfinite(output).all()


def _check_finite(network: str, finite_N: NDArray[np.bool_]) -> None:
    if not finite_N.all():
        raise NonFiniteOutputError(network, np.flatnonzero(~finite_N).tolist())
