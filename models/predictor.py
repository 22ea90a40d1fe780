"""The networks of a bundle, applied to batches of tiles: classifier, gate, and segmenter.

The segmenter runs only on tiles in which more than one class passes the gate.

Shape suffixes: N tiles, K classes, H and W the tile, h and w the map at the output stride.
"""

from __future__ import annotations

import logging
import platform
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import Bundle, ModelCard, load_networks, load_statistics
from models.errors import DeviceUnavailableError, NonFiniteOutputError, RuntimeUnavailableError
from models.familiarity import DescribingClassifier, Statistics, window_starts
from models.gate import masked_softmax, passing_classes
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

Tiles = NDArray[np.uint8] | Tensor
"""RGB tiles (N, H, W, 3) uint8. A tensor must be on the predictor's device."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prediction(NamedTuple):
    """The prediction for N tiles."""

    probs_NKhw: Tensor
    """float32 on the predictor's device: the classes that pass the gate sum to 1; all are 0 if none passes."""
    passed_NK: NDArray[np.bool_]
    """Which classes pass the gate."""
    segmented_N: NDArray[np.bool_]
    """Which tiles the segmentation network ran on."""
    distances_Nrc: NDArray[np.float32] | None = None
    """Distance of each window of a tile (rows, columns; see `models.familiarity`) from the training data, in units of
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

    `lock` guards the device: the caller holds `lock` around `predict`. A tile's result does not depend on the other
    tiles of its batch, and there is no random state.
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
        `skip_by_gate`: run the segmenter only on tiles whose result it can change; False runs it on all tiles and gives
        the same probabilities. `statistics`: the training windows of the model, whose card has `familiarity`; the
        classifier must be a `Classifier`. `from_networks` accepts "auto". Raises DeviceUnavailableError,
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
        self._statistics = None
        if statistics is not None:
            classifier = DescribingClassifier(classifier)
            self._statistics = statistics.to(self.device)
        self._classifier, self._segmenter = (self._prepared(network) for network in (classifier, segmenter))
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

    def presence(self, rgb_NHWC: Tiles) -> NDArray[np.float32]:
        """Return the classifier's probabilities (N, K) for RGB tiles. Raises NonFiniteOutputError."""
        return self._classified(self._checked(rgb_NHWC))[0]

    def logits(self, rgb_NHWC: Tiles) -> Tensor:
        """Return the segmenter's logits without the gate, (N, K, h, w) float32 on the predictor's device.

        Needs at least one RGB tile; H and W are multiples of 32. Raises NonFiniteOutputError.
        """
        tiles_NHWC = self._checked(rgb_NHWC)
        with torch.inference_mode():
            logits_NKhw = torch.cat([self._segmented(batch_NHWC) for batch_NHWC in tiles_NHWC.split(self.batch_size)])
            _check_finite("segmenter", _finite(logits_NKhw), np.arange(len(tiles_NHWC)))
        return logits_NKhw

    def gated(self, logits_NKhw: Tensor, presence_NK: NDArray[np.float32]) -> Tensor:
        """Return the gated probabilities of a segmenter's logits, probs_NKhw float32, as `predict` does."""
        return masked_softmax(logits_NKhw, self._gate(presence_NK)[1])

    def predict(self, rgb_NHWC: Tiles) -> Prediction:
        """Return gated probabilities for any number of RGB tiles; H and W are multiples of 32.

        Raises NonFiniteOutputError with the indices of the tiles whose output contains NaN or infinity.
        """
        tiles_NHWC = self._checked(rgb_NHWC)
        presence_NK, distances_Nrc = self._classified(tiles_NHWC)
        count, height, width = tiles_NHWC.shape[:3]
        classes = len(self.card.classes)
        stride = self.output_stride
        with torch.inference_mode():
            passed_NK, allowed_NK = self._gate(presence_NK)
            contested_N = (allowed_NK.sum(dim=1) > 1).cpu().numpy()
            segmented_N = contested_N if self.skip_by_gate else np.ones(count, dtype=bool)
            # The softmax over one class is 1 and over no class is 0, so the mask is the result without the segmenter.
            probs_NKhw = allowed_NK.float()[:, :, None, None].repeat(1, 1, height // stride, width // stride)
            chosen = np.flatnonzero(segmented_N)
            finite: list[Tensor] = []
            for index in torch.from_numpy(chosen).to(self.device).split(self.batch_size) if len(chosen) else ():
                logits_NKhw = self._segmented(tiles_NHWC[index])
                finite.append(_finite(logits_NKhw))
                probs_NKhw[index] = masked_softmax(logits_NKhw, allowed_NK[index])
            if finite:  # once, because the check waits for the GPU
                _check_finite("segmenter", torch.cat(finite), chosen)
        assert probs_NKhw.shape == (count, classes, height // stride, width // stride)
        return Prediction(probs_NKhw, passed_NK.cpu().numpy(), segmented_N, distances_Nrc)

    def _classified(self, tiles_NHWC: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the classifier's probabilities (N, K), and the distances (N, r, c) if there are statistics."""
        classes = len(self.card.classes)
        if not len(tiles_NHWC):
            return np.zeros((0, classes), dtype=np.float32), None
        with torch.inference_mode():
            found: list[Tensor] = []
            for batch_NHWC in tiles_NHWC.split(self.batch_size):
                with self._autocast():
                    found.append(self._classifier(normalized(batch_NHWC, self._mean_C, self._std_C)).float())
            output_NX = torch.cat(found)
            _check_finite("classifier", _finite(output_NX), np.arange(len(tiles_NHWC)))
            presence_NK: NDArray[np.float32] = output_NX[:, :classes].sigmoid().cpu().numpy()
            if self._statistics is None or self.card.familiarity is None:
                return presence_NK, None
            rows, columns = (len(window_starts(length)) for length in tiles_NHWC.shape[1:3])
            features_MF = output_NX[:, classes:].reshape(len(tiles_NHWC) * rows * columns, -1)
            distances_M = self._statistics.distances(features_MF) / self.card.familiarity.window_limit
            return presence_NK, distances_M.reshape(-1, rows, columns).cpu().numpy()

    def _prepared(self, network: nn.Module) -> Network:
        placed = _placed(network, self.device)
        if self.runtime == "openvino":
            return OpenVinoNetwork(placed, self.card.tile_size, self.precision)
        return placed

    def _gate(self, presence_NK: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        """Return which classes pass and which may have pixels: with `ungated_fallback`, all classes if none passes."""
        passed_NK = passing_classes(torch.from_numpy(presence_NK).to(self.device), self._thresholds_K)
        if self.ungated_fallback:
            return passed_NK, passed_NK | ~passed_NK.any(dim=1, keepdim=True)
        return passed_NK, passed_NK

    def _checked(self, rgb_NHWC: Tiles) -> Tensor:
        """Return tiles on the device. Raises ValueError if the array does not contain RGB tiles."""
        if rgb_NHWC.ndim != 4 or rgb_NHWC.shape[3] != 3 or rgb_NHWC.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"expected uint8 RGB tiles (N, H, W, 3), got {rgb_NHWC.dtype} {tuple(rgb_NHWC.shape)}")
        return rgb_NHWC if isinstance(rgb_NHWC, Tensor) else self.on_device(rgb_NHWC)

    def _segmented(self, tiles_NHWC: Tensor) -> Tensor:
        """Return the segmenter's logits for one batch, divided by the model's temperature."""
        with self._autocast():
            logits_NKhw = self._segmenter(normalized(tiles_NHWC, self._mean_C, self._std_C))
        return logits_at_stride(logits_NKhw.float() / self.card.temperature, self.output_stride)

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


def _finite(output: Tensor) -> Tensor:
    """Return which tiles contain neither NaN nor infinity, (N,) on the device."""
    return torch.isfinite(output).flatten(1).all(dim=1)


def _check_finite(network: str, finite_N: Tensor, indices: NDArray[np.int64]) -> None:
    good_N = finite_N.cpu().numpy()
    if not good_N.all():
        raise NonFiniteOutputError(network, [int(index) for index in indices[~good_N]])
