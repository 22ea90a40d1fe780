"""Runs a bundle on batches of tiles: classifier, gate, and the segmenter only where the gate leaves a choice.

Shape suffixes: N tiles, K classes, H and W the tile, h and w the map at the output stride.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import Bundle, ModelCard, load_networks
from models.errors import DeviceUnavailableError, NonFiniteOutputError, RuntimeUnavailableError
from models.gate import masked_softmax, passing_classes
from models.openvino_network import OpenVinoNetwork
from models.runtimes import Precision, Runtime, RuntimeName, choose_runtime
from models.segmenter import logits_at_stride

log = logging.getLogger(__name__)


Network = Callable[[Tensor], Tensor]
"""Normalised images (N, 3, H, W) -> logits."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prediction(NamedTuple):
    """What a predictor says of N tiles."""

    probs_NKhw: Tensor
    """float32 on the predictor's device: passing classes sum to 1, all 0 where none passes."""
    passed_NK: NDArray[np.bool_]
    """Which classes pass the gate."""
    segmented_N: NDArray[np.bool_]
    """Which tiles the segmentation network ran on."""
    presence_NK: NDArray[np.float32]
    """The classifier's probabilities."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" takes CUDA, then MPS, then the CPU. Raises DeviceUnavailableError for one
    that is not there.
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
                f"device {name}: this machine offers {count} CUDA device(s) to torch {torch.__version__}; use cpu"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailableError(f"device {name}: torch {torch.__version__} sees no MPS here; use cpu")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceUnavailableError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:0 or mps")
    return device


class Predictor:
    """A classifier and a segmenter held on one device.

    `lock` guards the device: the caller holds it around `predict`. Results depend on nothing but the tile: no random
    state, and tiles of a batch do not influence each other.
    """

    def __init__(
        self,
        card: ModelCard,
        digest: str,
        classifier: nn.Module,
        segmenter: nn.Module,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        runtime: RuntimeName = "torch",
        batch_size: int = 8,
        output_stride: int = 4,
        ungated_fallback: bool = False,
        skip_by_gate: bool = True,
    ) -> None:
        """Move both networks to `device` in eval mode.

        `ungated_fallback`: where no class passes use the ungated softmax, instead of 0 for every class. `skip_by_gate`:
        run the segmenter only on tiles where its result can matter; False runs it on all tiles and gives the same
        probabilities. `runtime`: see `choose_runtime`; "auto" goes back to torch where OpenVINO cannot take a network,
        `self.runtime` says what it came to. Raises DeviceUnavailableError, RuntimeUnavailableError, and ValueError for
        an unknown precision, stride or batch size.
        """
        if precision != "float32" and precision not in _AUTOCAST:
            raise ValueError(f"unknown precision {precision!r}; use float32, bf16 or fp16")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if output_stride not in (1, 2, 4):
            raise ValueError(f"output_stride is {output_stride}; use 1, 2 or 4")
        self.card = card
        self.digest = digest
        self.device = choose_device(device)
        self.precision = precision
        self.batch_size = batch_size
        self.output_stride = output_stride
        self.ungated_fallback = ungated_fallback
        self.skip_by_gate = skip_by_gate
        self.lock = threading.Lock()
        self.runtime, (self._classifier, self._segmenter) = self._prepared(runtime, classifier, segmenter)
        self._mean_1311 = torch.tensor(card.mean, device=self.device).view(1, 3, 1, 1)
        self._std_1311 = torch.tensor(card.std, device=self.device).view(1, 3, 1, 1)
        self._thresholds_K = torch.tensor(card.gate_thresholds, device=self.device)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, device: str = "auto", **options: Any) -> Self:
        """Return a predictor with the bundle's networks; `options` are the constructor's.

        Raises what `load_networks` and the constructor raise.
        """
        choose_device(device)  # before the weights are read
        return cls(bundle.card, bundle.digest, *load_networks(bundle), device=device, **options)

    def presence(self, rgb_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the classifier's probabilities (N, K) for RGB tiles. Raises NonFiniteOutputError."""
        if rgb_NHWC.ndim != 4 or rgb_NHWC.shape[3] != 3 or rgb_NHWC.dtype != np.uint8:
            raise ValueError(f"expected uint8 RGB tiles (N, H, W, 3), got {rgb_NHWC.dtype} {rgb_NHWC.shape}")
        found: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(rgb_NHWC), self.batch_size):
                with self._autocast():
                    logits_NK = self._classifier(self._normalised(rgb_NHWC[start : start + self.batch_size]))
                found.append(logits_NK.float())
            if not found:
                return np.zeros((0, len(self.card.classes)), dtype=np.float32)
            logits_NK = torch.cat(found)
            _check_finite("classifier", logits_NK, np.arange(len(rgb_NHWC)))
            presence_NK: NDArray[np.float32] = logits_NK.sigmoid().cpu().numpy()
        return presence_NK

    def logits(self, rgb_NHWC: NDArray[np.uint8]) -> Tensor:
        """Return the segmenter's logits before any gate, (N, K, h, w) float32 on the predictor's device.

        For at least one RGB tile (N, H, W, 3) uint8, H and W multiples of 32. Raises NonFiniteOutputError.
        """
        every = np.arange(len(rgb_NHWC))
        with torch.inference_mode():
            return torch.cat(
                [
                    self._segmented(rgb_NHWC, every[start : start + self.batch_size])
                    for start in range(0, len(every), self.batch_size)
                ]
            )

    def gated(self, logits_NKhw: Tensor, presence_NK: NDArray[np.float32]) -> Tensor:
        """Return what `predict` makes of a segmenter's logits and a classifier's probabilities: probs_NKhw float32."""
        return masked_softmax(logits_NKhw, self._gate(presence_NK)[1])

    def predict(self, rgb_NHWC: NDArray[np.uint8]) -> Prediction:
        """Return gated probabilities for any number of RGB tiles (N, H, W, 3) uint8, H and W multiples of 32.

        Raises NonFiniteOutputError with the indices of the tiles for which a network gave NaN or infinity.
        """
        presence_NK = self.presence(rgb_NHWC)
        count, height, width = rgb_NHWC.shape[:3]
        classes = len(self.card.classes)
        stride = self.output_stride
        with torch.inference_mode():
            passed_NK, allowed_NK = self._gate(presence_NK)
            contested_N = (allowed_NK.sum(dim=1) > 1).cpu().numpy()
            segmented_N = contested_N if self.skip_by_gate else np.ones(count, dtype=bool)
            # The softmax over one class is 1 and over none is 0: without the segmenter the mask itself is the result.
            probs_NKhw = allowed_NK.float()[:, :, None, None].repeat(1, 1, height // stride, width // stride)
            chosen = np.flatnonzero(segmented_N)
            for start in range(0, len(chosen), self.batch_size):
                picked = chosen[start : start + self.batch_size]
                index = torch.from_numpy(picked).to(self.device)
                probs_NKhw[index] = masked_softmax(self._segmented(rgb_NHWC, picked), allowed_NK[index])
        assert probs_NKhw.shape == (count, classes, height // stride, width // stride)
        return Prediction(probs_NKhw, passed_NK.cpu().numpy(), segmented_N, presence_NK)

    def _prepared(self, runtime: RuntimeName, *networks: nn.Module) -> tuple[Runtime, tuple[Network, ...]]:
        placed = tuple(_placed(network, self.device) for network in networks)
        if choose_runtime(runtime, self.device.type, self.precision) == "openvino":
            try:
                return "openvino", tuple(OpenVinoNetwork(network, self.card.tile_size) for network in placed)
            except RuntimeUnavailableError as error:
                if runtime == "openvino":
                    raise
                log.warning("%s: %s; torch is used, which takes longer", self.card.name, error)
        return "torch", placed

    def _gate(self, presence_NK: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        """Return which classes pass, and which may have pixels: the same, or all with `ungated_fallback` and none."""
        passed_NK = passing_classes(torch.from_numpy(presence_NK).to(self.device), self._thresholds_K)
        if self.ungated_fallback:
            return passed_NK, passed_NK | ~passed_NK.any(dim=1, keepdim=True)
        return passed_NK, passed_NK

    def _segmented(self, rgb_NHWC: NDArray[np.uint8], picked: NDArray[np.int64]) -> Tensor:
        """Return the segmenter's logits for the picked tiles, one batch."""
        with self._autocast():
            logits_NKhw = self._segmenter(self._normalised(rgb_NHWC[picked]))
        logits_NKhw = logits_at_stride(logits_NKhw.float(), self.output_stride)
        _check_finite("segmenter", logits_NKhw, picked)
        return logits_NKhw

    def _normalised(self, rgb_NHWC: NDArray[np.uint8]) -> Tensor:
        """Return bytes as the networks' input. A permuted NHWC array already lies in memory as channels_last."""
        x_NCHW = torch.from_numpy(np.ascontiguousarray(rgb_NHWC)).to(self.device).permute(0, 3, 1, 2).float()
        # In place: three arrays more for each batch leave holes in the heap that nothing else fits into.
        return x_NCHW.div_(255.0).sub_(self._mean_1311).div_(self._std_1311)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision])


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    # channels_last took a third off both networks' time on the CPU.
    # Any: torch's stubs leave `memory_format` out of Module.to.
    anywhere: Any = network.eval().to(device)
    placed: nn.Module = anywhere.to(memory_format=torch.channels_last)
    return placed


def _check_finite(network: str, output: Tensor, indices: NDArray[np.int64]) -> None:
    finite_N = torch.isfinite(output).flatten(1).all(dim=1).cpu().numpy()
    if not finite_N.all():
        raise NonFiniteOutputError(network, [int(index) for index in indices[~finite_N]])
