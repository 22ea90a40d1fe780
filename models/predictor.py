"""The networks of a bundle, applied to canvases: classifier, gate, and segmenter.

A canvas is a large part of a slide. Its core is what remains without the model's margin on all sides. Only the core is
predicted, so that every predicted pixel has real context around it. The segmenter runs only on canvases in which the
gate leaves several classes for a pixel.

Shape suffixes: N canvases, K classes, R rows and C columns of the gate windows of a canvas, M windows of several
canvases, H and W the canvas, h and w the core at the output stride, r and c the windows of `models.familiarity`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone_windows import RING, Place
from models.bundle import Bundle, load_networks, load_statistics
from models.card import ModelCard
from models.compute import choose_compute, loading
from models.deep_map import DeepWindows, batches_of, features_at, joined_windows, lone_windows, rows_of
from models.device_networks import DeviceNetworks
from models.devices import Uploads, choose_device, to_host
from models.errors import NonFiniteOutputError, RuntimeUnavailableError, WeightsMismatchError
from models.familiarity import Statistics, window_features
from models.fine_map import part_of
from models.gate import passing_classes, presence
from models.gate_windows import GateWindows, PixelGates, gate_windows, pixel_gates, placed
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

Corner = tuple[int, int]
"""The (x, y) of a core in model pixels of the slide, multiples of 16. Windows are counted from the origin."""


class Decisions(NamedTuple):
    """What follows from the classifier's output for N canvases, on the host."""

    segmented: list[list[Place]]
    """For each canvas, the parts of its core, in model pixels, on which the segmentation network runs."""
    distances: list[NDArray[np.float32]] | None
    """For each canvas, the distance of its windows (r, c) from the training data, in units of the model's limit; None
    without statistics."""


class Prediction(NamedTuple):
    """The prediction for the cores of N canvases of one size."""

    probs_NKhw: Tensor
    """float32 on the predictor's device. The sum over the classes is the share of the gate windows over the pixel that
    allow any class."""
    segmented_N: NDArray[np.bool_]
    """Whether the segmentation network ran on any part of the core."""
    distances_Nrc: NDArray[np.float32] | None = None
    """See `Decisions`."""


class _Canvas(NamedTuple):
    """A canvas on the device."""

    rgb_HWC: Tensor
    start: Tensor
    """What the networks start from in the canvas, or in its window of a shared backbone."""


class _Batch(NamedTuple):
    """Canvases of one size that pass the networks together."""

    canvases: list[int]
    """Their indices."""
    parts: list[Place]
    """The parts of their cores in which the segmenter runs, in model pixels."""
    windows: GateWindows
    """Their gate windows, on the device."""
    cells_Nhw: Tensor | None
    """`DeepWindows.cells` of the canvases, on the device; None unless the networks share their backbone."""


class _Rows(NamedTuple):
    """The outputs of the shared backbone: one row for each cell of all windows."""

    deep_TD: Tensor
    textures_TE: Tensor | None
    """See `models.familiarity.textures`; None without statistics."""


class _Classified(NamedTuple):
    """What the classifier computes for a batch, on the device."""

    logits_MK: Tensor
    """In the gate windows."""
    distances_Nrc: Tensor | None
    """See `Decisions`."""
    around_NDhw: Tensor | None
    """The deep features of the canvases and their `RING` if the segmenter takes them, else None."""


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
        self.skip_by_gate = skip_by_gate
        self.lock = threading.Lock()
        self.on_device = Uploads(self.device)
        self._statistics = None
        if statistics is not None and card.familiarity is not None:
            self._statistics = statistics.scaled(1 / card.familiarity.window_limit).to(self.device)
        textured = self._statistics is not None
        with loading():
            self._networks = DeviceNetworks(card, classifier, segmenter, compute, streams, textured=textured)
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
            canvases, deep = self._alone(rgb_NHWC)
            batches = self._batches(canvases, corners, deep)
            rows = self._rows(canvases, deep)
            logits = [self._classified(canvases, rows, batch).logits_MK for batch in batches]
            _check_finite("classifier", _order(batches), *to_host([_finite_canvases(batches, logits)]))
            return [
                presence_RCK
                for batch, logits_MK in zip(batches, logits, strict=True)
                for presence_RCK in presence(logits_MK).unflatten(0, batch.windows.shape)
            ]

    def logits(self, rgb_NHWC: Canvases) -> Tensor:
        """Return the segmenter's logits in the cores without the gate, (N, K, h, w) float32 on the predictor's device.

        Needs at least one canvas. Raises NonFiniteOutputError.
        """
        with torch.inference_mode():
            canvases, deep = self._alone(rgb_NHWC)
            around_NDhw, rows = None, self._rows(canvases, deep)
            if rows is not None and deep is not None:
                cells_Nhw = torch.from_numpy(np.stack(deep.cells)).to(self.device)
                around_NDhw = features_at(rows.deep_TD, cells_Nhw)
            core = [side - 2 * self.card.margin for side in canvases[0].rgb_HWC.shape[:2]]
            logits_NKhw = torch.empty(
                (len(canvases), len(self.card.classes), *(side // self.output_stride for side in core)),
                device=self.device,
            )
            for first in range(0, len(canvases), self.batch_size):
                some = slice(first, first + self.batch_size)
                starts = _decoded(canvases, deep, range(len(canvases))[some])
                features_NDhw = None if around_NDhw is None else around_NDhw[some]
                for part in self._networks.parts(core):
                    found_NKhw = self._networks.segmented(starts, features_NDhw, part, self.output_stride)
                    logits_NKhw[some, :, *self._on_map(part)] = found_NKhw
            _check_finite("segmenter", range(len(logits_NKhw)), *to_host([_finite(logits_NKhw)]))
        return logits_NKhw

    def gated(self, logits_Khw: Tensor, presence_RCK: Tensor, corner: Corner) -> Tensor:
        """Return the gated probabilities (K, h, w) of the segmenter's logits in one core, as `predict` does."""
        (windows,), _ = placed([self._windows([corner], logits_Khw.shape[1:])], [], self.device)
        return pixel_gates(self._allowed(presence_RCK.flatten(0, 1)), windows).probabilities(logits_Khw[None])[0]

    def predict(self, rgb_NHWC: Canvases, corners: Sequence[Corner]) -> Prediction:
        """Return gated probabilities for the cores of canvases of one size, each with the corner of its core.

        Raises NonFiniteOutputError with the indices of the canvases whose output contains NaN or infinity.
        """
        canvases_NHWC = self._checked(rgb_NHWC)
        sides = ((side - 2 * self.card.margin) // self.output_stride for side in canvases_NHWC.shape[1:3])
        probs_NKhw = torch.empty((len(canvases_NHWC), len(self.card.classes), *sides), device=self.device)
        with torch.inference_mode():
            segmented, distances = self._predict_into(list(probs_NKhw), *self._alone(canvases_NHWC), corners)
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
            canvases = [_Canvas(rgb_HWC[place], start) for place, start in zip(places, starts, strict=True)]
            return self._predict_into(probs, canvases, deep, corners, before_batch)

    def _predict_into(
        self,
        probs: Sequence[Tensor],
        canvases: Sequence[_Canvas],
        deep: DeepWindows | None,
        corners: Sequence[Corner],
        before_batch: Callable[[], object] = lambda: None,
    ) -> Decisions:
        batches = self._batches(canvases, corners, deep)
        rows = self._rows(canvases, deep, before_batch)
        classified = self._networks.each(partial(self._classified, canvases, rows), batches, before_batch)
        del rows
        gates, decisions = self._decided(batches, classified)

        def segment(item: tuple[int, Place]) -> Tensor:
            index, part = item
            batch, on_map = batches[index], self._on_map(part)
            chosen = [place for place, n in enumerate(batch.canvases) if part in decisions.segmented[n]]
            logits_NKhw = self._chosen_logits(canvases, deep, batch, part, chosen, classified[index].around_NDhw)
            found_NKhw = gates[index].inside(on_map).probabilities(logits_NKhw)
            for n, probs_Khw in zip(batch.canvases, found_NKhw, strict=True):
                probs[n][:, *on_map].copy_(probs_Khw)
            return _finite(logits_NKhw).expand(len(batch.canvases))

        items = [(index, part) for index, batch in enumerate(batches) for part in batch.parts]
        finite = self._networks.each(segment, items, before_batch)
        _check_finite("segmenter", [n for n, _ in _in_parts(batches)], *to_host([torch.cat(finite)]))
        return decisions

    def _alone(self, rgb_NHWC: Canvases) -> tuple[list[_Canvas], DeepWindows | None]:
        """Return canvases of one size, each an image of its own, and the windows of a shared backbone.

        Raises what `_checked` raises.
        """
        checked_NHWC, stride = self._checked(rgb_NHWC), self._networks.shared_stride
        count, *size = checked_NHWC.shape[:3]
        canvases = [_Canvas(canvas, self._networks.start_alone(canvas)) for canvas in checked_NHWC]
        if stride is None:
            return canvases, None
        return canvases, lone_windows(size, count, self.card.margin, stride, self.batch_size)

    def _rows(
        self,
        canvases: Sequence[_Canvas],
        deep: DeepWindows | None,
        before_batch: Callable[[], object] = lambda: None,
    ) -> _Rows | None:
        """Return what the backbone computes in all windows; None unless the networks share it."""
        if deep is None:
            return None

        def rows(batch: Sequence[int]) -> list[Tensor]:
            maps = self._networks.deep([canvases[n].start for n in batch])
            return [rows_of(map_NChw) for map_NChw in maps if map_NChw is not None]

        found = self._networks.each(rows, deep.batches, before_batch)
        joined = found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]
        return _Rows(joined[0], joined[1] if len(joined) > 1 else None)

    def _batches(
        self, canvases: Sequence[_Canvas], corners: Sequence[Corner], deep: DeepWindows | None
    ) -> list[_Batch]:
        """Return batches of canvases of one size, with what belongs to them by a single copy to the device."""
        batches = batches_of([canvas.rgb_HWC.shape[1::-1] for canvas in canvases], self.batch_size)
        windows, parts = [], []
        for batch in batches:
            core = [side - 2 * self.card.margin for side in canvases[batch[0]].rgb_HWC.shape[:2]]
            parts.append(self._networks.parts(core))
            windows.append(self._windows([corners[n] for n in batch], [side // self.output_stride for side in core]))
        cells = [] if deep is None else [torch.from_numpy(np.stack([deep.cells[n] for n in one])) for one in batches]
        there, cells = placed(windows, cells, self.device)
        of_batch: Sequence[Tensor | None] = cells or [None] * len(batches)
        return [_Batch(*one) for one in zip(batches, parts, there, of_batch, strict=True)]

    def _windows(self, corners: Sequence[Corner], size_out: Sequence[int]) -> GateWindows:
        """Return the gate windows of canvases whose cores have this height and width at the output stride."""
        return gate_windows(corners, size_out, self.card.margin, self.card.gate_window, self.output_stride)

    def _classified(self, canvases: Sequence[_Canvas], rows: _Rows | None, batch: _Batch) -> _Classified:
        """Return what the classifier computes for a batch. `rows` is the result of `_rows`."""
        images = [canvases[n].rgb_HWC for n in batch.canvases]
        around_NDhw = None
        if rows is None or batch.cells_Nhw is None:
            deep_NDhw, textures_NEhw = self._networks.deep([canvases[n].start for n in batch.canvases])
        else:
            around_NDhw = features_at(rows.deep_TD, batch.cells_Nhw)
            ring = RING * around_NDhw.shape[2] // (images[0].shape[0] + 2 * RING)
            inside = ..., slice(ring, -ring), slice(ring, -ring)
            deep_NDhw, textures_NEhw = around_NDhw[inside], None
            if rows.textures_TE is not None:
                textures_NEhw = features_at(rows.textures_TE, batch.cells_Nhw)[inside]
        logits_MK = self._networks.window_logits(deep_NDhw, images, batch.windows)
        if self._statistics is None or textures_NEhw is None:
            return _Classified(logits_MK, None, around_NDhw)
        features_NrcC = window_features(textures_NEhw, images[0].shape[0] // textures_NEhw.shape[2])
        distances_Nrc = self._statistics.distances(features_NrcC.flatten(0, 2)).view(features_NrcC.shape[:3])
        return _Classified(logits_MK, distances_Nrc, around_NDhw)

    def _decided(
        self, batches: Sequence[_Batch], classified: Sequence[_Classified]
    ) -> tuple[list[PixelGates], Decisions]:
        """Return the gates of each batch, and the decisions, for which the host waits."""
        logits = [one.logits_MK for one in classified]
        distances = [one.distances_Nrc for one in classified if one.distances_Nrc is not None]
        allowed = [self._allowed(presence(logits_MK)) for logits_MK in logits]
        gates = [pixel_gates(one_MK, batch.windows) for one_MK, batch in zip(allowed, batches, strict=True)]
        contested = [
            one_N
            for gate, batch in zip(gates, batches, strict=True)
            for one_N in gate.contested([self._on_map(part) for part in batch.parts])
        ]
        finite_N, contested_T, *found = to_host([_finite_canvases(batches, logits), torch.cat(contested), *distances])
        order = _order(batches)
        _check_finite("classifier", order, finite_N)
        segmented: list[list[Place]] = [[] for _ in order]
        for (n, part), depends in zip(_in_parts(batches), contested_T.tolist(), strict=True):
            if depends or not self.skip_by_gate:
                segmented[n].append(part)
        by_batch = [distances_rc for distances_Nrc in found for distances_rc in distances_Nrc]
        known = [by_batch[place] for place in np.argsort(order)] if by_batch else None
        return gates, Decisions(segmented, known)

    def _chosen_logits(
        self,
        canvases: Sequence[_Canvas],
        deep: DeepWindows | None,
        batch: _Batch,
        part: Place,
        chosen: Sequence[int],
        around_NDhw: Tensor | None,
    ) -> Tensor:
        """Return the segmenter's logits (N, K, h, w) for a part of the cores of a batch, computed for chosen canvases.

        They are (1, K, 1, 1) if none is chosen. For `around_NDhw`, see `_Classified`. A part on which the segmenter
        does not run has no contested pixel: any logits give the same probabilities.
        """
        if not chosen:
            return torch.zeros((1, len(self.card.classes), 1, 1), device=self.device)
        starts = _decoded(canvases, deep, [batch.canvases[position] for position in chosen])
        if around_NDhw is not None and len(chosen) < len(batch.canvases):
            around_NDhw = torch.stack([around_NDhw[position] for position in chosen])
        found_NKhw = self._networks.segmented(starts, around_NDhw, part, self.output_stride)
        if len(chosen) == len(batch.canvases):
            return found_NKhw
        logits_NKhw = found_NKhw.new_zeros((len(batch.canvases), *found_NKhw.shape[1:]))
        for position, found_Khw in zip(chosen, found_NKhw, strict=True):
            logits_NKhw[position].copy_(found_Khw)
        return logits_NKhw

    def _on_map(self, part: Place) -> Place:
        """Return the rows and columns of a core's map for a part of the core in model pixels."""
        rows, columns = (slice(side.start // self.output_stride, side.stop // self.output_stride) for side in part)
        return rows, columns

    def _allowed(self, presence_MK: Tensor) -> Tensor:
        """Return which classes may have pixels in each window; with `ungated_fallback`, all classes if none passes."""
        passed_MK = passing_classes(presence_MK, self._thresholds_K)
        return passed_MK | ~passed_MK.any(dim=1, keepdim=True) if self.ungated_fallback else passed_MK

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


def _decoded(canvases: Sequence[_Canvas], deep: DeepWindows | None, chosen: Sequence[int]) -> list[Tensor]:
    """Return what the segmenter starts from on some of the canvases."""
    if deep is None:
        return [canvases[n].start for n in chosen]
    return [part_of(canvases[n].start, deep.cores[n]) for n in chosen]


def _order(batches: Sequence[_Batch]) -> list[int]:
    """Return the indices of the canvases, batch by batch."""
    return [n for batch in batches for n in batch.canvases]


def _in_parts(batches: Sequence[_Batch]) -> list[tuple[int, Place]]:
    """Return the index of the canvas and the part of its core, batch by batch and part by part."""
    return [(n, part) for batch in batches for part in batch.parts for n in batch.canvases]


def _finite(output: Tensor) -> Tensor:
    """Return which entries of the first axis contain neither NaN nor infinity, on the device."""
    return torch.isfinite(output).flatten(1).all(dim=1)


def _finite_canvases(batches: Sequence[_Batch], logits: Sequence[Tensor]) -> Tensor:
    """Return in which canvases, batch by batch, the logits (M, K) of the windows are finite, on the device."""
    by_canvas = (one_MK.unflatten(0, (len(batch.canvases), -1)) for batch, one_MK in zip(batches, logits, strict=True))
    return torch.cat([_finite(one_NMK) for one_NMK in by_canvas])


def _check_finite(network: str, canvases: Sequence[int], finite: NDArray[np.bool_]) -> None:
    if not finite.all():
        raise NonFiniteOutputError(network, sorted({n for n, good in zip(canvases, finite, strict=True) if not good}))
