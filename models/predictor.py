"""The networks of a bundle, applied to canvases: classifier, gate, and segmenter.

A canvas is a large part of a slide. Its core is what remains without the model's margin on all sides. Only the core is
predicted, so that every predicted pixel has real context around it. The segmenter runs only on canvases with a gate
window in which more than one class passes.

Shape suffixes: N canvases, K classes, R rows and C columns of gate windows, M windows, H and W the canvas, h and w the
core at the output stride.
"""

from __future__ import annotations

import logging
import platform
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone import Stages
from models.bundle import Bundle, ModelCard, load_networks, load_statistics
from models.errors import DeviceUnavailableError, NonFiniteOutputError, RuntimeUnavailableError
from models.familiarity import Statistics, window_features
from models.gate import passing_classes
from models.gate_windows import WindowAxis, cut_windows, gated_mean, window_axis
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

Corner = tuple[int, int]
"""The (x, y) of a core in model pixels of the slide, multiples of 16. Windows are counted from the origin."""

SMALLEST_CORE = 32
"""Smallest side of a core in model pixels. Larger sides are multiples of it."""

_WINDOWS = 256
"""Gate windows that the head of the classifier takes at a time, which bounds its memory."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prediction(NamedTuple):
    """The prediction for the cores of N canvases."""

    probs_NKhw: Tensor
    """float32 on the predictor's device. The sum over the classes is 1; it is less near windows in which no class
    passes, and 0 inside them."""
    segmented_N: NDArray[np.bool_]
    """Which canvases the segmentation network ran on."""
    distances_Nrc: NDArray[np.float32] | None = None
    """Distance of each window of a canvas (rows, columns; see `models.familiarity`) from the training data, in units of
    the model's limit; None without statistics."""


def choose_device(name: str) -> torch.device:
    """Return the device with this name; "auto" returns CUDA, MPS or the CPU, whichever is available first.

    Raises DeviceUnavailableError if the machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailableError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:0 or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceUnavailableError(
                f"device {name}: torch {torch.__version__} finds {count} CUDA device(s) on this machine; use cpu"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailableError(
            f"device {name}: torch {torch.__version__} does not find MPS on this machine; use cpu"
        )
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceUnavailableError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:0 or mps")
    return device


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


def processor_name(device: torch.device) -> str:
    """Return the model of the processor that computes networks on a device, with the instruction set of a CPU.

    The kernels, and with them the last bits of an output, depend on it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    """Return the model of the CPU. On systems without /proc, Python has a shorter name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


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
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._features = self._prepared(DeepFeatures(classifier))
        self._segmenter = self._prepared(segmenter)
        self._classifier: Any = classifier
        self._statistics = None if statistics is None else statistics.to(self.device)
        self._mean_C = torch.tensor(card.mean, device=self.device)
        self._std_C = torch.tensor(card.std, device=self.device)
        self._thresholds_K = torch.tensor(card.gate_thresholds, device=self.device)

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

    def on_device(self, rgb: NDArray[np.uint8]) -> Tensor:
        """Return an array of any shape as a tensor on the device. The caller need not hold the lock.

        On a CPU, the tensor shares the array's memory. On CUDA, the bytes are copied from page-locked memory on a
        separate stream while the device computes, and the copy is complete when this returns.
        """
        host = torch.from_numpy(np.ascontiguousarray(rgb))
        if self._copies is None:
            return host.to(self.device)
        with torch.cuda.stream(self._copies):
            there = host.pin_memory().to(self.device, non_blocking=True)
        # The memory belongs to the stream of the copies. Do not reuse it for the next copy while a network reads it.
        there.record_stream(torch.cuda.current_stream(self.device))
        self._copies.synchronize()
        return there

    def presence(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> list[Tensor]:
        """Return the classifier's probabilities (R, C, K) in the gate windows that overlap the core of each canvas.

        Raises NonFiniteOutputError with the indices of the canvases.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        return self._classified(canvases_NHWC, self._window_axes(canvases_NHWC.shape[1:3], corners))[0]

    def logits(self, rgb_NHWC: Canvases) -> Tensor:
        """Return the segmenter's logits in the cores without the gate, (N, K, h, w) float32 on the predictor's device.

        Needs at least one canvas. Raises NonFiniteOutputError.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        with torch.inference_mode():
            logits_NKhw = torch.cat([self._segmented(batch) for batch in canvases_NHWC.split(self.batch_size)])
            _check_finite("segmenter", list(_finite(logits_NKhw)))
        return logits_NKhw

    def gated(self, logits_Khw: Tensor, presence_RCK: Tensor, corner: Corner) -> Tensor:
        """Return the gated probabilities (K, h, w) of the segmenter's logits in one core, as `predict` does."""
        size = [length * self.output_stride + 2 * self.card.margin for length in logits_Khw.shape[1:]]
        (axes,) = self._window_axes(size, [corner])
        return gated_mean(logits_Khw, self._allowed(presence_RCK), *axes)

    def predict(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> Prediction:
        """Return gated probabilities for the cores of canvases, each with the corner of its core.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        margin, stride = self.card.margin, self.output_stride
        height, width = (length - 2 * margin for length in canvases_NHWC.shape[1:3])
        with torch.inference_mode():
            axes = self._window_axes(canvases_NHWC.shape[1:3], corners)
            presence, distances_Nrc = self._classified(canvases_NHWC, axes)
            allowed = [self._allowed(presence_RCK) for presence_RCK in presence]
            contested_N = torch.stack([(allowed_RCK.sum(dim=2) > 1).any() for allowed_RCK in allowed]).cpu().numpy()
            segmented_N = contested_N if self.skip_by_gate else np.ones(len(allowed), dtype=bool)
            chosen = np.flatnonzero(segmented_N)
            # Where the segmenter does not run, no window has a choice, and any logits give the same probabilities.
            logits: list[Tensor] = [torch.zeros((len(self.card.classes), 1, 1), device=self.device)] * len(allowed)
            for index in torch.from_numpy(chosen).split(self.batch_size) if len(chosen) else ():
                for n, logits_Khw in zip(index.tolist(), self._segmented(canvases_NHWC[index]), strict=True):
                    logits[n] = logits_Khw
            _check_finite("segmenter", [torch.isfinite(logits_Khw).all() for logits_Khw in logits])
            parts = zip(logits, allowed, axes, strict=True)
            probs_NKhw = torch.stack(
                [gated_mean(logits_Khw, allowed_RCK, *both) for logits_Khw, allowed_RCK, both in parts]
            )
        assert probs_NKhw.shape[1:] == (len(self.card.classes), height // stride, width // stride)
        return Prediction(probs_NKhw, segmented_N, distances_Nrc)

    def _classified(
        self, canvases_NHWC: Tensor, axes: Sequence[tuple[WindowAxis, WindowAxis]]
    ) -> tuple[list[Tensor], NDArray[np.float32] | None]:
        """Return `presence`, and the distances (N, r, c) if there are statistics. `axes` are those of each canvas."""
        found: list[Tensor] = []
        distances: list[Tensor] = []
        with torch.inference_mode():
            for batch_NHWC in canvases_NHWC.split(self.batch_size):
                x_NCHW = normalized(batch_NHWC, self._mean_C, self._std_C)
                with self._autocast():
                    deep_NDhw = self._features(x_NCHW)
                    for deep_Dhw, x_CHW in zip(deep_NDhw, x_NCHW, strict=True):
                        found.append(self._window_logits(deep_Dhw, x_CHW, *axes[len(found)]))
                if self._statistics is not None:
                    features_NrcD = window_features(deep_NDhw, x_NCHW.shape[2] // deep_NDhw.shape[2])
                    distances_M = self._statistics.distances(features_NrcD.flatten(0, 2))
                    distances.append(distances_M.view(features_NrcD.shape[:3]))
            _check_finite("classifier", [torch.isfinite(logits_RCK).all() for logits_RCK in found])
            presence = [logits_RCK.sigmoid() for logits_RCK in found]
            if not distances or self.card.familiarity is None:
                return presence, None
            return presence, (torch.cat(distances) / self.card.familiarity.window_limit).cpu().numpy()

    def _prepared(self, network: nn.Module) -> Network:
        placed = _placed(network, self.device)
        if self.runtime == "openvino":
            return OpenVinoNetwork(placed, 2 * self.card.margin + SMALLEST_CORE, self.precision)
        return placed

    def _allowed(self, presence_RCK: Tensor) -> Tensor:
        """Return which classes may have pixels in each window; with `ungated_fallback`, all classes if none passes."""
        passed_RCK = passing_classes(presence_RCK, self._thresholds_K)
        return passed_RCK | ~passed_RCK.any(dim=2, keepdim=True) if self.ungated_fallback else passed_RCK

    def _window_axes(self, size: Sequence[int], corners: Sequence[Corner]) -> list[tuple[WindowAxis, WindowAxis]]:
        """Return the rows and columns of the gate windows of canvases of this height and width."""
        card = self.card
        height, width = (length - 2 * card.margin for length in size)
        return [
            (
                window_axis(y, height, card.margin, card.gate_window, self.output_stride),
                window_axis(x, width, card.margin, card.gate_window, self.output_stride),
            )
            for x, y in corners
        ]

    def _window_logits(self, deep_Dhw: Tensor, x_CHW: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
        """Return the logits (R, C, K) of the classifier's head in the windows of one canvas."""
        stride = x_CHW.shape[1] // deep_Dhw.shape[1]
        together = max(1, _WINDOWS // len(columns.starts))
        found = []
        for first in range(0, len(rows.starts), together):
            some = replace(rows, starts=rows.starts[first : first + together])
            deep_MDhw = cut_windows(deep_Dhw, some, columns, stride)
            head_output = self._classifier.head_output(
                Stages(deep_MDhw, deep_MDhw, deep_MDhw), cut_windows(x_CHW, some, columns)
            )
            found.append(head_output.logits_NK.float().unflatten(0, (-1, len(columns.starts))))
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


def _finite(output: Tensor) -> Tensor:
    """Return which canvases contain neither NaN nor infinity, (N,) on the device."""
    return torch.isfinite(output).flatten(1).all(dim=1)


def _check_finite(network: str, finite: Sequence[Tensor]) -> None:
    good_N = torch.stack(list(finite)).cpu().numpy()
    if not good_N.all():
        raise NonFiniteOutputError(network, np.flatnonzero(~good_N).tolist())
