"""The networks of a bundle on one device: what they compute for batches of canvases.

Shape suffixes: N canvases, K classes, C channels, D channels of the deep features, E channels of the textures, M gate
windows, H and W the canvas, h and w a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from models.backbone import Stages
from models.backbone_windows import OVERLAP, RING, Place
from models.card import ModelCard
from models.compute import one_torch_thread
from models.decoder_parts import PART_SIDE, cut, parts_of, reads_beyond
from models.devices import compiles_sizes, native_convolutions
from models.fine_map import fine_map, part_of
from models.gate_windows import GateWindows, cut_windows
from models.normalize import OfBytes, normalized
from models.openvino_network import IMAGE, MapSize, OpenVinoNetwork
from models.padding import pad_before_expansion
from models.runtimes import AHEAD, CONTEXT, Compute
from models.segmenter import AROUND, NATIVE_STRIDE, RIM, logits_at_stride
from models.shared_stages import split_networks

Item = TypeVar("Item")
Result = TypeVar("Result")

Network = Callable[..., Any]
"""RGB bytes (N, H, W, 3) or maps (N, C, h, w) -> a map or logits."""

SMALLEST_CORE = 32
"""Smallest side of a core in model pixels. Larger sides are multiples of it."""

_WINDOW_VALUES = 1 << 22
"""Numbers in the gate windows whose features the head of the classifier takes at a time, which bounds its memory."""

_FINE_SIDE = {"cpu": 288}
"""Side of the windows in which the shared map is computed, by the type of the device. On a CPU, maps of this size fit
in the cache: the first stages of EfficientNet-Lite0 take 0.045 s per megapixel instead of 0.074 s with 896 px."""
_FINE_SIDE_ELSEWHERE = 1056

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceNetworks:
    """A classifier and a segmenter in eval mode on a device, compiled if the runtime is OpenVINO.

    Both start from what `starts` returns: their shared map, which is computed once, or the image if they share nothing.
    """

    def __init__(
        self,
        card: ModelCard,
        classifier: nn.Module,
        segmenter: nn.Module,
        compute: Compute,
        streams: int = 1,
        *,
        textured: bool = False,
    ) -> None:
        """Prepare both networks. OpenVINO computes at most `streams` calls at a time: see `models.runtimes.STREAMS`.

        `textured`: `deep` also returns the textures. Raises RuntimeUnavailableError if OpenVINO does not support a
        network.
        """
        self._card, self._compute, self.device = card, compute, torch.device(compute.device)
        self._mean_C, self._std_C = (torch.tensor(scale).to(self.device) for scale in (card.mean, card.std))
        # On one device, because their weights are compared.
        classifier, segmenter = (network.to(self.device) for network in (classifier, segmenter))
        self._native = compiles_sizes(self.device, classifier, segmenter)  # canvases have many sizes
        padded = pad_before_expansion(classifier), pad_before_expansion(segmenter)
        networks = split_networks(*padded, card.margin, textured=textured)
        self._in_windows = networks.first is not None and networks.reach_px <= CONTEXT
        # Rounded up, because windows start at whole cells of the shared map.
        self._context = NATIVE_STRIDE * math.ceil(min(networks.reach_px, CONTEXT) / NATIVE_STRIDE)
        # Each stream keeps its own activations. Whole networks on whole canvases need too much memory for two streams.
        several = compute.runtime == "openvino" and self._in_windows
        self._streams = min(streams, compute.threads) if several else 1
        # Windows are smaller than canvases.
        self._first = (
            None
            if networks.first is None
            else self._prepared(networks.first, size=2 * CONTEXT + SMALLEST_CORE, ahead=AHEAD)
        )
        self.shared_stride = None if networks.shared_deep is None else networks.shared_deep[1]
        """The stride of the deep features if the segmenter takes the classifier's, else None."""
        start = IMAGE if networks.first is None else MapSize(*networks.start)
        self._part_side = None
        if self.shared_stride is not None and self.device.type == "cpu":
            cells = (card.margin + RING - AROUND) // self.shared_stride
            self._part_side = None if reads_beyond(cells, card.segmenter.rates) else PART_SIDE
        self.ahead = 0 if self._part_side is None else AHEAD
        """Parts of cores that Python prepares while all streams compute; 0 if the segmenter takes whole cores."""
        # The windows of a shared backbone can have less context than canvases.
        context = card.margin if networks.shared_deep is None else min(OVERLAP, card.margin)
        self._deep = self._prepared(networks.deep, [start], size=2 * context + SMALLEST_CORE)
        maps = [start]
        if networks.shared_deep is not None:
            maps = [start._replace(beyond=AROUND - card.margin), MapSize(*networks.shared_deep, RING)]
        in_parts = self._part_side is not None
        self._segmenter = self._prepared(networks.segmenter, maps, ahead=self.ahead, few_sizes=in_parts)
        # If the whole backbone is shared, no other network holds the head.
        self._classifier: Any = _placed(networks.classifier, self.device)

    def starts(
        self, rgb_HWC: Tensor, places: Sequence[Place], before_each: Callable[[], object] = lambda: None
    ) -> list[Tensor]:
        """Return what the networks start from at these places of an image (H, W, 3): canvases, or their windows.

        Each is the part of the shared map (C, h, w), or of the image itself (H, W, 3). See `each` for `before_each`.
        """
        canvases = [rgb_HWC[place] for place in places]
        if self._first is None:
            return canvases
        if not self._in_windows:
            return self.each(self.start_alone, canvases, before_each)
        before_each()
        side = _FINE_SIDE.get(self.device.type, _FINE_SIDE_ELSEWHERE)
        each = partial(self.each, before_each=before_each, ahead=AHEAD)
        map_Chw = fine_map(self._fine, rgb_HWC, places, side, self._context, each)
        return [part_of(map_Chw, place) for place in places]

    def start_alone(self, rgb_HWC: Tensor) -> Tensor:
        """Return what the networks start from on a canvas that is an image of its own, as `starts` does."""
        return rgb_HWC if self._first is None else self._fine(rgb_HWC[None])[0]

    def deep(self, starts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the classifier's deep features (N, D, h, w) and the textures (N, E, h, w) for starts of one size.

        The textures are None unless the networks are `textured`. See `models.familiarity.textures`.
        """
        with self._computing():
            found = self._deep(_batch(starts))
        return found if isinstance(found, tuple) else (found, None)

    def parts(self, core: Sequence[int]) -> list[Place]:
        """Return the parts of a core of this height and width that `segmented` takes, in pixels of the core."""
        return parts_of(core, self._part_side)

    def segmented(self, starts: Sequence[Tensor], deep_NDhw: Tensor | None, part: Place, output_stride: int) -> Tensor:
        """Return the segmenter's logits (N, K, h, w) in a part of the cores, divided by the model's temperature.

        With a `shared_stride`, `starts` are `DeepWindows.cores`, and `deep_NDhw` has the features of the canvases and
        their `RING`. Without it, `starts` are canvases, and `deep_NDhw` is None.
        """
        if deep_NDhw is None or self.shared_stride is None:
            maps = [_batch(starts)]
        else:
            maps = [
                _batch([cut(start_Chw, part, AROUND, NATIVE_STRIDE) for start_Chw in starts]),
                cut(deep_NDhw, part, self._card.margin + RING, self.shared_stride),
            ]
        with self._computing():
            logits_NKhw: Tensor = self._segmenter(*maps)
        # Upsample before the rim is cut off, so that the edge of a core is interpolated like its inside.
        logits_NKhw = logits_at_stride(logits_NKhw.float() / self._card.temperature, output_stride)
        edge = RIM * NATIVE_STRIDE // output_stride
        return logits_NKhw[:, :, edge:-edge, edge:-edge]

    def window_logits(self, deep_NDhw: Tensor, canvases: Sequence[Tensor], windows: GateWindows) -> Tensor:
        """Return the logits (M, K) of the classifier's head in the gate windows of canvases (H, W, 3) of one size."""
        with self._computing():
            return self._window_logits(deep_NDhw, canvases, windows)

    def _window_logits(self, deep_NDhw: Tensor, canvases: Sequence[Tensor], windows: GateWindows) -> Tensor:
        classifier, stride = self._classifier, canvases[0].shape[0] // deep_NDhw.shape[2]
        x_NCHW = None
        if classifier.reads_images:
            x_NCHW = normalized(torch.stack(list(canvases)), self._mean_C, self._std_C)
        whole = range(math.prod(windows.shape))
        if classifier.class_scores:
            # Windows overlap, and a map has fewer channels than the features.
            map_NKhw = classifier.head_output(Stages(deep_NDhw, deep_NDhw, deep_NDhw), x_NCHW).map_NKhw
            scores_MK: Tensor = classifier.pooled(cut_windows(map_NKhw, windows, whole, stride))
            return scores_MK.float()
        values_px = deep_NDhw.shape[1] / stride**2 + (0 if x_NCHW is None else x_NCHW.shape[1])
        at_once = max(1, int(_WINDOW_VALUES / (values_px * math.prod(windows.sides))))
        found = []
        for first in whole[::at_once]:
            some = whole[first : first + at_once]
            deep_MDhw = cut_windows(deep_NDhw, windows, some, stride)
            # Windows of an image are many times as large as those of the features.
            x_MCHW = None if x_NCHW is None else cut_windows(x_NCHW, windows, some)
            head_output = classifier.head_output(Stages(deep_MDhw, deep_MDhw, deep_MDhw), x_MCHW)
            found.append(head_output.logits_NK.float())
        return torch.cat(found)

    def each(
        self,
        run: Callable[[Item], Result],
        items: Sequence[Item],
        before_each: Callable[[], object] = lambda: None,
        *,
        ahead: int = 0,
    ) -> list[Result]:
        """Return `run(item)` for each item, in order.

        With several streams, `ahead` more items run at once than there are streams. Each item takes memory: see
        `AHEAD`. `before_each` is called before each item; an error that it or `run` raises ends the call.
        """

        def one(item: Item) -> Result:
            before_each()
            return run(item)

        if self._streams == 1 or len(items) == 1:
            return list(map(one, items))

        def inferred(item: Item) -> Result:
            # Inference mode is set per thread.
            with torch.inference_mode():
                return one(item)

        # An error cancels the items that have not started.
        with ThreadPoolExecutor(self._streams + ahead) as pool:
            return list(pool.map(inferred, items))

    def own_threads(self) -> AbstractContextManager[None]:
        """Compute torch's operations in the calling thread while OpenVINO computes the networks."""
        openvino = self._compute.runtime == "openvino"
        return one_torch_thread(self._compute.threads) if openvino else nullcontext()

    def _fine(self, rgb_NHWC: Tensor) -> Tensor:
        """Return the shared map of images."""
        with self._computing():
            map_NChw: Tensor = cast(Network, self._first)(rgb_NHWC)
        return map_NChw

    def _prepared(
        self,
        network: nn.Module,
        maps: Sequence[MapSize] = (IMAGE,),
        size: int | None = None,
        *,
        ahead: int = 0,
        few_sizes: bool = False,
    ) -> Network:
        """Return a network on the device, for maps of these sizes, or for the bytes of images.

        `size` is the smallest side of an image, if it is not that of a canvas. For `few_sizes`, see `OpenVinoNetwork`.
        """
        placed = _placed(OfBytes(network, self._mean_C, self._std_C) if maps[0] == IMAGE else network, self.device)
        if self._compute.runtime == "openvino":
            smallest = size or 2 * self._card.margin + SMALLEST_CORE
            return OpenVinoNetwork(
                placed,
                smallest,
                self._compute.precision,
                maps=maps,
                streams=self._streams,
                threads=self._compute.threads,
                ahead=ahead if self._streams > 1 else 0,
                few_sizes=few_sizes,
            )
        return placed

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Call networks in this context: it has their precision, and the kernels of their convolutions."""
        precision = self._compute.precision
        automatic = precision != "float32" and self._compute.runtime != "openvino"
        with (
            native_convolutions(self._native),
            torch.autocast(self.device.type, dtype=_AUTOCAST[precision]) if automatic else nullcontext(),
        ):
            yield


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    # On the CPU, channels_last takes a third less time for both networks.
    # Any: torch's stubs leave `memory_format` out of Module.to.
    anywhere: Any = network.eval().to(device)
    placed: nn.Module = anywhere.to(memory_format=torch.channels_last)
    return placed


def _batch(starts: Sequence[Tensor]) -> Tensor:
    """Return starts of one size as a batch for the networks. The batch of a single start is a view."""
    return starts[0][None] if len(starts) == 1 else torch.stack(list(starts))
