"""The networks of a bundle on one device: what they compute for batches of canvases.

Shape suffixes: N canvases, K classes, C channels, D channels of the deep features, M gate windows, H and W the canvas,
h and w a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Stages
from models.bundle import ModelCard
from models.gate_windows import GateWindows, cut_windows
from models.normalize import normalized
from models.openvino_network import OpenVinoNetwork, as_tuple
from models.padding import pad_before_expansion
from models.runtimes import Compute
from models.segmenter import NATIVE_STRIDE, RIM, logits_at_stride
from models.shared_stages import split_networks

Network = Callable[..., Any]
"""Images or maps (N, C, h, w) -> maps or logits."""

Maps = tuple[Tensor, ...]
"""What both networks start from: images, or the maps of the stages that they share. See `Networks.maps`."""

SMALLEST_CORE = 32
"""Smallest side of a core in model pixels. Larger sides are multiples of it."""

_WINDOW_VALUES = 1 << 22
"""Numbers in the gate windows whose features the head of the classifier takes at a time, which bounds its memory."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceNetworks:
    """A classifier and a segmenter in eval mode on a device, compiled if the runtime is OpenVINO.

    What both share is computed once: `deep` and `segmented` take the output of `started`.
    """

    def __init__(self, card: ModelCard, classifier: nn.Module, segmenter: nn.Module, compute: Compute) -> None:
        """Prepare both networks. Raises RuntimeUnavailableError if OpenVINO does not support one."""
        self._card, self._compute, self._device = card, compute, torch.device(compute.device)
        # On one device, because their weights are compared.
        classifier, segmenter = (network.to(self._device) for network in (classifier, segmenter))
        networks = split_networks(pad_before_expansion(classifier), pad_before_expansion(segmenter), card.margin)
        self._first = None if networks.first is None else self._prepared(networks.first)
        self._deep = None if networks.deep is None else self._prepared(networks.deep, networks.maps)
        self._segmenter = self._prepared(networks.segmenter, networks.maps)
        # If the whole backbone is shared, no other network holds the head.
        self._classifier: Any = _placed(networks.classifier, self._device)
        self._mean_C = torch.tensor(card.mean).to(self._device)
        self._std_C = torch.tensor(card.std).to(self._device)

    @property
    def share_stages(self) -> bool:
        """Return whether both networks start with the same stages. If not, `started` returns the images."""
        return self._first is not None

    def normalized(self, canvases_NHWC: Tensor) -> Tensor:
        """Return canvases as the networks take them: see `models.normalize.normalized`."""
        return normalized(canvases_NHWC, self._mean_C, self._std_C)

    def started(self, x_NCHW: Tensor) -> Maps:
        """Return the maps of the stages that both networks share; the images if they share none."""
        if self._first is None:
            return (x_NCHW,)
        with self._autocast():
            return as_tuple(self._first(x_NCHW))

    def deep(self, maps: Maps) -> Tensor:
        """Return the classifier's deep features (N, D, h, w)."""
        if self._deep is None:
            return maps[-1]
        with self._autocast():
            deep_NDhw: Tensor = self._deep(*maps)
        return deep_NDhw

    def segmented(self, maps: Maps, output_stride: int) -> Tensor:
        """Return the segmenter's logits (N, K, h, w) in the cores, divided by the model's temperature."""
        with self._autocast():
            logits_NKhw: Tensor = self._segmenter(*maps)
        # Upsample before the rim is cut off, so that the edge of a core is interpolated like its inside.
        logits_NKhw = logits_at_stride(logits_NKhw.float() / self._card.temperature, output_stride)
        edge = RIM * NATIVE_STRIDE // output_stride
        return logits_NKhw[:, :, edge:-edge, edge:-edge]

    def window_logits(self, deep_NDhw: Tensor, x_NCHW: Tensor, windows: GateWindows) -> Tensor:
        """Return the logits (M, K) of the classifier's head in the gate windows of normalized canvases."""
        with self._autocast():
            return self._window_logits(deep_NDhw, x_NCHW, windows)

    def _window_logits(self, deep_NDhw: Tensor, x_NCHW: Tensor, windows: GateWindows) -> Tensor:
        classifier, stride = self._classifier, x_NCHW.shape[2] // deep_NDhw.shape[2]
        whole = range(math.prod(windows.shape))
        if classifier.class_scores:
            # Windows overlap, and a map has fewer channels than the features.
            map_NKhw = classifier.head_output(Stages(deep_NDhw, deep_NDhw, deep_NDhw), x_NCHW).map_NKhw
            scores_MK: Tensor = classifier.pooled(cut_windows(map_NKhw, windows, whole, stride))
            return scores_MK.float()
        values_px = deep_NDhw.shape[1] / stride**2 + (x_NCHW.shape[1] if classifier.reads_images else 0)
        at_once = max(1, int(_WINDOW_VALUES / (values_px * math.prod(windows.sides))))
        found = []
        for first in whole[::at_once]:
            some = whole[first : first + at_once]
            deep_MDhw = cut_windows(deep_NDhw, windows, some, stride)
            # Windows of an image are many times as large as those of the features.
            x_MCHW = cut_windows(x_NCHW, windows, some) if classifier.reads_images else None
            head_output = classifier.head_output(Stages(deep_MDhw, deep_MDhw, deep_MDhw), x_MCHW)
            found.append(head_output.logits_NK.float())
        return torch.cat(found)

    def _prepared(self, network: nn.Module, maps: Sequence[tuple[int, int]] = ((3, 1),)) -> Network:
        """Return a network on the device, for maps with these channels and strides."""
        placed = _placed(network, self._device)
        if self._compute.runtime == "openvino":
            smallest = 2 * self._card.margin + SMALLEST_CORE
            return OpenVinoNetwork(placed, smallest, self._compute.precision, maps=maps)
        return placed

    def _autocast(self) -> AbstractContextManager[object]:
        precision = self._compute.precision
        if precision == "float32" or self._compute.runtime == "openvino":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=_AUTOCAST[precision])


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    # On the CPU, channels_last takes a third less time for both networks.
    # Any: torch's stubs leave `memory_format` out of Module.to.
    anywhere: Any = network.eval().to(device)
    placed: nn.Module = anywhere.to(memory_format=torch.channels_last)
    return placed
