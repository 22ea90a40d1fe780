"""Canvases on their way through the networks of a model: classifier, gate, and segmenter.

The segmenter runs only on parts of canvases in which the gate leaves several classes for a pixel.

Shape suffixes: N canvases, K classes, R rows and C columns of the gate windows of a canvas, M windows of several
canvases, H and W the canvas, h and w the core at the output stride, r and c the windows of `models.familiarity`, T
cells of all windows of a shared backbone, D channels of the deep features, E of the textures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbone_windows import RING, Place
from models.card import ModelCard
from models.deep_map import DeepWindows, batches_of, features_at, rows_of
from models.device_networks import DeviceNetworks
from models.devices import to_host
from models.errors import NonFiniteOutputError
from models.familiarity import Statistics, window_features
from models.fine_map import part_of
from models.gate import passing_classes, presence
from models.gate_windows import GateWindows, PixelGates, gate_windows, pixel_gates, placed

Item = TypeVar("Item")

Corner = tuple[int, int]
"""The (x, y) of a core in model pixels of the slide, multiples of 16. Windows are counted from the origin."""


class PassSettings(NamedTuple):
    """What a pass needs besides the networks and the canvases. The tensors are on the device."""

    card: ModelCard
    output_stride: int
    """Model pixels per pixel of the probabilities."""
    batch_size: int
    thresholds_K: Tensor
    """A class passes in a gate window if its probability is above its threshold."""
    statistics: Statistics | None
    """The training windows of the model, in units of its limit."""
    ungated_fallback: bool
    """If no class passes in a window, all classes pass, instead of none."""
    skip_by_gate: bool
    """Run the segmenter only on parts of cores whose result it can change."""

    def allowed(self, presence_MK: Tensor) -> Tensor:
        """Return which classes may have pixels in each window, (M, K) bool."""
        passed_MK = passing_classes(presence_MK, self.thresholds_K)
        return passed_MK | ~passed_MK.any(dim=1, keepdim=True) if self.ungated_fallback else passed_MK

    def windows(self, corners: Sequence[Corner], size_out: Sequence[int]) -> GateWindows:
        """Return the gate windows of canvases whose cores have this height and width at the output stride."""
        return gate_windows(corners, size_out, self.card.margin, self.card.gate_window, self.output_stride)

    def on_map(self, part: Place) -> Place:
        """Return the rows and columns of a core's map for a part of the core in model pixels."""
        rows, columns = (slice(side.start // self.output_stride, side.stop // self.output_stride) for side in part)
        return rows, columns


class Decisions(NamedTuple):
    """What follows from the classifier's output for N canvases, on the host."""

    segmented: list[list[Place]]
    """For each canvas, the parts of its core, in model pixels, on which the segmentation network runs."""
    distances: list[NDArray[np.float32]] | None
    """For each canvas, the distance of its windows (r, c) from the training data, in units of the model's limit; None
    without statistics."""


class Canvas(NamedTuple):
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


class CanvasPass:
    """Canvases that pass the networks of a model together. Needs inference mode. Used for one of its methods, once."""

    def __init__(
        self,
        networks: DeviceNetworks,
        settings: PassSettings,
        canvases: Sequence[Canvas],
        corners: Sequence[Corner],
        deep: DeepWindows | None,
        before_batch: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare the batches of at least one canvas, and copy what belongs to them to the device at once.

        `corners` are those of the cores. `deep` has the windows of a shared backbone; None if the networks share none.
        `before_batch` is called before each batch and may raise an error, which ends the pass.
        """
        self._networks, self._settings, self._card = networks, settings, settings.card
        self._canvases, self._deep, self._before_batch = canvases, deep, before_batch
        self._batches = self._batched(corners)

    def presence(self) -> list[Tensor]:
        """Return the classifier's probabilities (R, C, K) in the gate windows of each canvas.

        Raises NonFiniteOutputError with the indices of the canvases.
        """
        classified = self._classified()
        _check_finite("classifier", self._order(), *to_host([self._finite_canvases(classified)]))
        return self._in_order(
            [
                presence_RCK
                for batch, one in zip(self._batches, classified, strict=True)
                for presence_RCK in presence(one.logits_MK).unflatten(0, batch.windows.shape)
            ]
        )

    def logits(self) -> list[Tensor]:
        """Return the segmenter's logits (K, h, w) float32 in the core of each canvas, without the gate.

        Raises NonFiniteOutputError with the indices of the canvases.
        """
        rows, stride = self._rows(), self._settings.output_stride
        by_batch: list[Tensor] = []
        finite: list[Tensor] = []
        for batch in self._batches:
            around_NDhw = None
            if rows is not None and batch.cells_Nhw is not None:
                around_NDhw = features_at(rows.deep_TD, batch.cells_Nhw)
            logits_NKhw = self._zeros(
                len(batch.canvases), batch.windows.weight_NhR.shape[1], batch.windows.weight_NwC.shape[1]
            )
            for part in batch.parts:
                found_NKhw = self._networks.segmented(self._decoded(batch.canvases), around_NDhw, part, stride)
                logits_NKhw[:, :, *self._settings.on_map(part)] = found_NKhw
            by_batch += list(logits_NKhw)
            finite.append(_finite(logits_NKhw))
        _check_finite("segmenter", self._order(), *to_host([torch.cat(finite)]))
        return self._in_order(by_batch)

    def predict_into(self, probs: Sequence[Tensor]) -> Decisions:
        """Write the gated probabilities (K, h, w) of the core of each canvas.

        The host waits for the device twice: for the decisions about all canvases, and at the end. Raises
        NonFiniteOutputError with the indices of the canvases.
        """
        classified = self._classified()
        gates, decisions = self._decided(classified)

        def segment(item: tuple[int, Place]) -> Tensor:
            index, part = item
            batch, on_map = self._batches[index], self._settings.on_map(part)
            chosen = [place for place, n in enumerate(batch.canvases) if part in decisions.segmented[n]]
            logits_NKhw = self._chosen_logits(batch, part, chosen, classified[index].around_NDhw)
            found_NKhw = gates[index].inside(on_map).probabilities(logits_NKhw)
            for n, probs_Khw in zip(batch.canvases, found_NKhw, strict=True):
                probs[n][:, *on_map].copy_(probs_Khw)
            return _finite(logits_NKhw).expand(len(batch.canvases))

        items = [(index, part) for index, batch in enumerate(self._batches) for part in batch.parts]
        finite = self._networks.each(segment, items, self._before_batch, ahead=self._networks.ahead)
        _check_finite("segmenter", [n for n, _ in self._in_parts()], *to_host([torch.cat(finite)]))
        return decisions

    def _batched(self, corners: Sequence[Corner]) -> list[_Batch]:
        """Return batches of canvases of one size, with what belongs to them by a single copy to the device."""
        sizes = [canvas.rgb_HWC.shape[:2] for canvas in self._canvases]
        chosen = batches_of(sizes, self._settings.batch_size)
        windows, parts, cells = [], [], []
        for batch in chosen:
            core = [side - 2 * self._card.margin for side in sizes[batch[0]]]
            parts.append(self._networks.parts(core))
            size_out = [side // self._settings.output_stride for side in core]
            windows.append(self._settings.windows([corners[n] for n in batch], size_out))
            if self._deep is not None:
                cells.append(torch.from_numpy(np.stack([self._deep.cells[n] for n in batch])))
        there, cells = placed(windows, cells, self._networks.device)
        of_batch: Sequence[Tensor | None] = cells or [None] * len(chosen)
        return [_Batch(*one) for one in zip(chosen, parts, there, of_batch, strict=True)]

    def _rows(self) -> _Rows | None:
        """Return what the backbone computes in all windows; None unless the networks share it."""
        if self._deep is None:
            return None

        def rows(batch: Sequence[int]) -> list[Tensor]:
            maps = self._networks.deep([self._canvases[n].start for n in batch])
            return [rows_of(map_NChw) for map_NChw in maps if map_NChw is not None]

        found = self._networks.each(rows, self._deep.batches, self._before_batch)
        joined = found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]
        return _Rows(joined[0], joined[1] if len(joined) > 1 else None)

    def _classified(self) -> list[_Classified]:
        """Return what the classifier computes for each batch."""
        rows = self._rows()
        return self._networks.each(lambda batch: self._classify(batch, rows), self._batches, self._before_batch)

    def _classify(self, batch: _Batch, rows: _Rows | None) -> _Classified:
        images = [self._canvases[n].rgb_HWC for n in batch.canvases]
        around_NDhw = None
        if rows is None or batch.cells_Nhw is None:
            deep_NDhw, textures_NEhw = self._networks.deep([self._canvases[n].start for n in batch.canvases])
        else:
            around_NDhw = features_at(rows.deep_TD, batch.cells_Nhw)
            ring = RING * around_NDhw.shape[2] // (images[0].shape[0] + 2 * RING)
            inside = ..., slice(ring, -ring), slice(ring, -ring)
            deep_NDhw, textures_NEhw = around_NDhw[inside], None
            if rows.textures_TE is not None:
                textures_NEhw = features_at(rows.textures_TE, batch.cells_Nhw)[inside]
        logits_MK = self._networks.window_logits(deep_NDhw, images, batch.windows)
        statistics = self._settings.statistics
        if statistics is None or textures_NEhw is None:
            return _Classified(logits_MK, None, around_NDhw)
        features_NrcC = window_features(textures_NEhw, images[0].shape[0] // textures_NEhw.shape[2])
        distances_Nrc = statistics.distances(features_NrcC.flatten(0, 2)).view(features_NrcC.shape[:3])
        return _Classified(logits_MK, distances_Nrc, around_NDhw)

    def _decided(self, classified: Sequence[_Classified]) -> tuple[list[PixelGates], Decisions]:
        """Return the gates of each batch, and the decisions, for which the host waits."""
        distances = [one.distances_Nrc for one in classified if one.distances_Nrc is not None]
        allowed = [self._settings.allowed(presence(one.logits_MK)) for one in classified]
        gates = [pixel_gates(one_MK, batch.windows) for one_MK, batch in zip(allowed, self._batches, strict=True)]
        contested = [
            one_N
            for gate, batch in zip(gates, self._batches, strict=True)
            for one_N in gate.contested([self._settings.on_map(part) for part in batch.parts])
        ]
        finite_N, contested_T, *found = to_host([self._finite_canvases(classified), torch.cat(contested), *distances])
        if found:
            finite_N = finite_N & np.concatenate([np.isfinite(one_Nrc).all(axis=(1, 2)) for one_Nrc in found])
        _check_finite("classifier", self._order(), finite_N)
        segmented: list[list[Place]] = [[] for _ in self._canvases]
        for (n, part), depends in zip(self._in_parts(), contested_T.tolist(), strict=True):
            if depends or not self._settings.skip_by_gate:
                segmented[n].append(part)
        by_batch = [distances_rc for distances_Nrc in found for distances_rc in distances_Nrc]
        return gates, Decisions(segmented, self._in_order(by_batch) if by_batch else None)

    def _chosen_logits(self, batch: _Batch, part: Place, chosen: Sequence[int], around_NDhw: Tensor | None) -> Tensor:
        """Return the segmenter's logits (N, K, h, w) for a part of the cores of a batch, computed for chosen canvases.

        They are (1, K, 1, 1) if none is chosen. For `around_NDhw`, see `_Classified`. A part on which the segmenter
        does not run has no contested pixel: any logits give the same probabilities.
        """
        if not chosen:
            return self._zeros(1, 1, 1)
        starts = self._decoded([batch.canvases[position] for position in chosen])
        if around_NDhw is not None and len(chosen) < len(batch.canvases):
            around_NDhw = torch.stack([around_NDhw[position] for position in chosen])
        found_NKhw = self._networks.segmented(starts, around_NDhw, part, self._settings.output_stride)
        if len(chosen) == len(batch.canvases):
            return found_NKhw
        logits_NKhw = self._zeros(len(batch.canvases), *found_NKhw.shape[2:])
        for position, found_Khw in zip(chosen, found_NKhw, strict=True):
            logits_NKhw[position].copy_(found_Khw)
        return logits_NKhw

    def _decoded(self, canvases: Sequence[int]) -> list[Tensor]:
        """Return what the segmenter starts from on some of the canvases."""
        if self._deep is None:
            return [self._canvases[n].start for n in canvases]
        return [part_of(self._canvases[n].start, self._deep.cores[n]) for n in canvases]

    def _zeros(self, count: int, height: int, width: int) -> Tensor:
        return torch.zeros((count, len(self._card.classes), height, width), device=self._networks.device)

    def _order(self) -> list[int]:
        """Return the indices of the canvases, batch by batch."""
        return [n for batch in self._batches for n in batch.canvases]

    def _in_order(self, by_batch: Sequence[Item]) -> list[Item]:
        """Return values that are given batch by batch in the order of the canvases."""
        return [by_batch[place] for place in np.argsort(self._order())]

    def _in_parts(self) -> list[tuple[int, Place]]:
        """Return the index of the canvas and the part of its core, batch by batch and part by part."""
        return [(n, part) for batch in self._batches for part in batch.parts for n in batch.canvases]

    def _finite_canvases(self, classified: Sequence[_Classified]) -> Tensor:
        """Return for which canvases, batch by batch, the logits of the windows are finite, on the device."""
        pairs = zip(self._batches, classified, strict=True)
        return torch.cat([_finite(one.logits_MK.unflatten(0, (len(batch.canvases), -1))) for batch, one in pairs])


def _finite(output: Tensor) -> Tensor:
    """Return which entries of the first axis contain neither NaN nor infinity, on the device."""
    return torch.isfinite(output).flatten(1).all(dim=1)


def _check_finite(network: str, canvases: Sequence[int], finite: NDArray[np.bool_]) -> None:
    if not finite.all():
        raise NonFiniteOutputError(network, sorted({n for n, good in zip(canvases, finite, strict=True) if not good}))
