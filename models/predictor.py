"""The networks of a bundle, applied to canvases: classifier, gate, and segmenter.

A canvas is a large part of a slide. Its core is what remains without the model's margin on all sides. Only the core is
predicted, so that every predicted pixel has real context around it. `models.canvas_pass` has the steps.

Shape suffixes: N canvases, K classes, R rows and C columns of the gate windows of a canvas, M windows of several
canvases, H and W the canvas, h and w the core at the output stride, r and c the windows of `models.familiarity`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone_windows import Place
from models.bundle import Bundle, load_networks, load_statistics
from models.canvas_pass import Canvas, CanvasPass, Corner, Decisions, PassSettings
from models.card import ModelCard
from models.compute import choose_compute, loading
from models.deep_map import joined_windows, lone_windows
from models.device_networks import DeviceNetworks
from models.devices import Uploads, choose_device
from models.errors import RuntimeUnavailableError, WeightsMismatchError
from models.familiarity import Statistics
from models.gate_windows import pixel_gates, placed
from models.runtimes import (
    BATCH_SIZE,
    OUTPUT_STRIDES,
    Compute,
    Precision,
    Runtime,
    RuntimeName,
    check_precision,
)

log = logging.getLogger(__name__)

Canvases = NDArray[np.uint8] | Tensor
"""RGB canvases (N, H, W, 3) uint8; H and W are multiples of 32. A tensor must be on the predictor's device."""


class Prediction(NamedTuple):
    """The prediction for the cores of N canvases of one size."""

    probs_NKhw: Tensor
    """float32 on the predictor's device. The sum over the classes is the share of the gate windows over the pixel that
    allow any class."""
    segmented_N: NDArray[np.bool_]
    """Whether the segmentation network ran on any part of the core."""
    distances_Nrc: NDArray[np.float32] | None = None
    """See `models.canvas_pass.Decisions`."""


class Predictor:
    """A classifier and a segmenter on one device.

    `lock` guards the device: the caller holds `lock` around `predict`. A canvas's result depends on its own pixels and,
    if it is a place of a larger image, on the `models.runtimes.CONTEXT` pixels around it. If the networks share their
    backbone, it also depends on the other canvases of this image, see `models.deep_map`. Batches do not change it, and
    nothing is random.
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
        streams: int = 1,
        output_stride: int = OUTPUT_STRIDES[0],
        ungated_fallback: bool = False,
        skip_by_gate: bool = True,
        statistics: Statistics | None = None,
    ) -> None:
        """Run both networks on `device` in eval mode. This may modify the networks passed in.

        `streams`: canvases that OpenVINO may compute at a time in `predict_into`, each with activations of its own.
        `ungated_fallback`: if no class passes in a window, all classes pass, instead of none.
        `skip_by_gate`: run the segmenter only on parts of cores whose result it can change; False runs it on all parts
        and gives the same probabilities. `statistics`: the training windows of the model, whose card has `familiarity`.
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
        self.lock = threading.Lock()
        self.on_device = Uploads(self.device)
        own = None
        with loading():
            if statistics is not None and card.familiarity is not None:
                own = statistics.scaled(1 / card.familiarity.window_limit).to(self.device)
            self._networks = DeviceNetworks(card, classifier, segmenter, compute, streams, textured=own is not None)
        self._settings = PassSettings(
            card=card,
            output_stride=output_stride,
            batch_size=self.batch_size,
            thresholds_K=torch.tensor(card.gate_thresholds).to(self.device),
            statistics=own,
            ungated_fallback=ungated_fallback,
            skip_by_gate=skip_by_gate,
        )

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
        with loading():
            networks = load_networks(bundle)
        if statistics is not None:
            _check_fit(bundle, statistics, networks[0])
        return cls.from_networks(bundle.card, bundle.digest, *networks, device=device, statistics=statistics, **options)

    def own_threads(self) -> AbstractContextManager[None]:
        """Return a context for the work done while `lock` is held: see `DeviceNetworks.own_threads`."""
        return self._networks.own_threads()

    @property
    def compute(self) -> Compute:
        """Return how the networks are computed."""
        return Compute(str(self.device), self.precision, self.runtime, self.batch_size, self.threads, self.processor)

    def presence(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> list[Tensor]:
        """Return the classifier's probabilities (R, C, K) in the gate windows that overlap the core of each canvas.

        Raises NonFiniteOutputError with the indices of the canvases.
        """
        with torch.inference_mode():
            return self._alone(rgb_NHWC, corners).presence()

    def logits(self, rgb_NHWC: Canvases) -> Tensor:
        """Return the segmenter's logits in the cores without the gate, (N, K, h, w) float32 on the predictor's device.

        Needs at least one canvas. Raises NonFiniteOutputError.
        """
        with torch.inference_mode():
            return torch.stack(self._alone(rgb_NHWC, [(0, 0)] * len(rgb_NHWC)).logits())

    def gated(self, logits_Khw: Tensor, presence_RCK: Tensor, corner: Corner) -> Tensor:
        """Return the gated probabilities (K, h, w) of the segmenter's logits in one core, as `predict` does."""
        (windows,), _ = placed([self._settings.windows([corner], logits_Khw.shape[1:])], [], self.device)
        allowed_MK = self._settings.allowed(presence_RCK.flatten(0, 1))
        return pixel_gates(allowed_MK, windows).probabilities(logits_Khw[None])[0]

    def predict(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> Prediction:
        """Return gated probabilities for the cores of canvases of one size, each with the corner of its core.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity.
        """
        sides = ((side - 2 * self.card.margin) // self.output_stride for side in rgb_NHWC.shape[1:3])
        with torch.inference_mode():
            alone = self._alone(rgb_NHWC, corners)
            probs_NKhw = torch.empty((len(rgb_NHWC), len(self.card.classes), *sides), device=self.device)
            segmented, distances = alone.predict_into(list(probs_NKhw))
        segmented_N = np.array([bool(parts) for parts in segmented])
        return Prediction(probs_NKhw, segmented_N, None if distances is None else np.stack(distances))

    def predict_into(
        self,
        probs: Sequence[Tensor],
        rgb_HWC: Tensor,
        places: Sequence[Place],
        corners: Sequence[Corner],
        before_batch: Callable[[], object] = lambda: None,
        *,
        block: Place | None = None,
    ) -> Decisions:
        """Write the gated probabilities for the cores of canvases, which are places of an image (H, W, 3).

        Canvases may have different sizes, and their margins may overlap. If the networks share their backbone, canvases
        that lie side by side belong in one call. The sides of the image and the limits of the places are
        multiples of 16. `block` is the part of the image beyond which the cores of other calls can follow; None stands
        for the bounding box of the cores.
        `probs` are (K, h, w) float32 and, like the image, on the predictor's device. `before_batch` is
        called before each batch, and between the parts of a longer computation; an error that it raises ends the
        prediction. The host waits for the device twice: for the decisions about all canvases, and at the end.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity. They include
        canvases beside one with such features of a shared backbone.
        """
        with torch.inference_mode():
            stride = self._networks.shared_stride
            deep = None
            if stride is not None:
                deep = joined_windows(places, rgb_HWC.shape, self.card.margin, stride, self.batch_size, block)
            starts = self._networks.starts(rgb_HWC, places if deep is None else deep.places, before_batch)
            canvases = [Canvas(rgb_HWC[place], start) for place, start in zip(places, starts, strict=True)]
            run = CanvasPass(self._networks, self._settings, canvases, corners, deep, before_batch)
            return run.predict_into(probs)

    def _alone(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> CanvasPass:
        """Return a pass of canvases of one size, each an image of its own. Raises what `_checked` raises."""
        checked_NHWC, stride = self._checked(rgb_NHWC), self._networks.shared_stride
        count, *size = checked_NHWC.shape[:3]
        canvases = [Canvas(canvas, self._networks.start_alone(canvas)) for canvas in checked_NHWC]
        deep = None if stride is None else lone_windows(size, count, self.card.margin, stride, self.batch_size)
        return CanvasPass(self._networks, self._settings, canvases, corners, deep)

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


def _check_fit(bundle: Bundle, statistics: Statistics, classifier: Any) -> None:
    expected, actual = 2 * sum(classifier.backbone.stage_channels[:2]), statistics.mean_GC.shape[1]
    if actual != expected:
        raise WeightsMismatchError(
            f"{bundle.path}: the statistics of the training windows have {actual} features, but the classifier "
            f"needs {expected}; make them again with `wsi-familiarity BUNDLE DATASET --data FOLDER`"
        )
