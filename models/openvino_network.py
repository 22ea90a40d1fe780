"""A network computed by OpenVINO.

On a CPU, OpenVINO takes about half the time of PyTorch for the same labels, and less with float16 on some processors.

Shape suffixes: N batch, H and W the image.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.errors import RuntimeUnavailableError
from models.padding import ExtendedConv2d
from models.runtimes import Precision, load_openvino

_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "fp16": 0.05, "bf16": 0.25}
"""Largest difference of an output, as a share of the largest output. With the default bundle, float32 has 3e-6 and
bf16 0.05. A wrong conversion causes far larger differences."""

_FORMATS: dict[Precision, str] = {"float32": "f32", "fp16": "f16", "bf16": "bf16"}
"""Names of the formats in OpenVINO."""


class MapSize(NamedTuple):
    """The size of an argument of a network: a feature map of an image, or the image itself."""

    channels: int
    stride: int
    """Pixels of the image per cell."""
    beyond: int = 0
    """Pixels by which the map reaches beyond the image on all sides; below 0 if it is smaller."""
    of_bytes: bool = False
    """Whether the argument is (N, h, w, C) uint8, not (N, C, h, w) float32."""

    def side(self, pixels: int) -> int:
        """Return the side of the map for a side of the image."""
        return (pixels + 2 * self.beyond) // self.stride

    def example(self, height: int, width: int) -> Tensor:
        """Return a random argument for an image of this size in pixels."""
        random = torch.Generator().manual_seed(0)
        sides = self.side(height), self.side(width)
        if self.of_bytes:
            return torch.randint(256, (1, *sides, self.channels), generator=random, dtype=torch.uint8)
        return torch.randn((1, self.channels, *sides), generator=random)


IMAGE = MapSize(3, 1, of_bytes=True)
"""The argument of `models.normalize.OfBytes`."""


class _Request:
    """A request for inference. It copies arguments to memory that it keeps, because fresh pages take time."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._kept: dict[int, Tensor] = {}

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        # Share inputs in every call: a call without sharing would overwrite the array that the last call shared.
        arrays = [self._contiguous(n, argument).numpy() for n, argument in enumerate(arguments)]
        outputs = self._request.infer(arrays, share_inputs=True, share_outputs=False)
        return [torch.from_numpy(outputs[n]) for n in range(len(outputs))]

    def _contiguous(self, n: int, argument: Tensor) -> Tensor:
        if argument.is_contiguous():
            return argument
        kept = self._kept.get(n)
        if kept is None or kept.dtype != argument.dtype or kept.numel() < argument.numel():
            # A tensor that is made in inference mode cannot be written outside it.
            with torch.inference_mode(mode=False):
                kept = self._kept[n] = torch.empty(argument.numel(), dtype=argument.dtype)
        return kept[: argument.numel()].view(argument.shape).copy_(argument)


class OpenVinoNetwork:
    """A network compiled for the CPU. Called like the network: images (N, C, H, W) float32 -> its output, or a tuple of
    its outputs, float32.

    N can be any number, and H and W any multiples of 32 from the side that the network was traced at, or of 16 if its
    strides allow that. The result of an image does not depend on the other images. A network may also take feature
    maps or bytes, see `MapSize`.
    Calls may overlap. If all streams are busy, a call waits. Nothing is written to disk.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        precision: Precision = "float32",
        *,
        maps: Sequence[MapSize] = (MapSize(3, 1),),
        streams: int = 1,
        threads: int | None = None,
        ahead: int = 0,
        few_sizes: bool = False,
    ) -> None:
        """Compile the network, in eval mode, and compare its outputs for images of this side with those of torch.

        `size` is the smallest side of an image: at a smaller side than the trace, padding may not have enough pixels.
        `maps` describes each argument of the network. Each of the `streams` keeps its own activations. They share the
        `threads`; None stands for as many as torch has. Up to `ahead` more calls can hand over their arguments before a
        stream is free. Each takes memory for its arguments and outputs. With `few_sizes`, kernels are kept for each
        size of the maps.

        Raises RuntimeUnavailableError if OpenVINO does not support the network, or if its outputs differ from torch's.
        """
        self._smallest = maps[0].side(size)
        threads = threads or torch.get_num_threads()
        self._sides = slice(1, 3) if maps[0].of_bytes else slice(2, 4)
        compiled = _compile(network, _examples(maps, size, size), _FORMATS[precision], streams, threads, few_sizes)
        self._requests: queue.Queue[_Request] = queue.Queue()
        for _ in range(streams + ahead):
            self._requests.put(_Request(compiled))
        self._compare(network, size, precision, maps)

    def _compare(self, network: nn.Module, size: int, precision: Precision, maps: Sequence[MapSize]) -> None:
        """Raise RuntimeUnavailableError if the outputs differ from those of the network in torch."""
        # The conversion of an arbitrary timm network can go wrong, and a trace can hold the size of its example.
        sizes = [(size, size), (size, size + 32)]
        # At the smallest side, padding may not have enough pixels to mirror. The trace would then pad larger images in
        # the same way, so a larger image is compared too.
        if mirroring := [m for m in network.modules() if isinstance(m, ExtendedConv2d) and m.mode == "reflect"]:
            sizes.append((4 * size, 4 * size))
        for height, width in sizes:
            examples = _examples(maps, height, width)
            with torch.no_grad():
                expected = network(*examples)
            found = self(*examples)
            pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
            if not all(_close(precision, *pair) for pair in pairs):
                if _mirrors_too_much(network, mirroring, _examples(maps, size, size)):
                    raise RuntimeUnavailableError(
                        f"runtime openvino: this model mirrors more pixels at the edges than its smallest image "
                        f"({size} px) contains; use runtime torch, or train the model with a larger margin"
                    )
                raise RuntimeUnavailableError(
                    "runtime openvino: its outputs for this model differ from those of torch; use runtime torch"
                )

    def __call__(self, *maps: Tensor) -> Any:
        sides = tuple(maps[0].shape[self._sides])
        if min(sides) < self._smallest:
            # OpenVINO would return the output of the last call.
            raise ValueError(f"images have {sides} px; the smallest side is {self._smallest}")
        request = self._requests.get()
        try:
            found = request(maps)
        finally:
            self._requests.put(request)
        return tuple(found) if len(found) > 1 else found[0]


def _examples(maps: Sequence[MapSize], height: int, width: int) -> list[Tensor]:
    """Return random arguments of a network for an image of this size in pixels."""
    return [one.example(height, width) for one in maps]


def _mirrors_too_much(network: nn.Module, mirroring: Sequence[ExtendedConv2d], examples: Sequence[Tensor]) -> bool:
    """Return whether one of these convolutions has too few pixels to mirror if the network gets these arguments."""
    found: list[bool] = []

    def look(conv: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, ExtendedConv2d)
        found.append(max(conv.edges) >= min(arguments[0].shape[2:]))

    hooks = [conv.register_forward_pre_hook(look) for conv in mirroring]
    try:
        with torch.no_grad():
            network(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)


def _close(precision: Precision, found: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCES[precision] * float(expected.nan_to_num().abs().max().clamp_min(1))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def _compile(
    network: nn.Module,
    examples: Sequence[Tensor],
    number_format: str,
    streams: int,
    threads: int,
    few_sizes: bool,
) -> Any:
    """Return the network compiled for maps of any size, traced at these sizes.

    Raises RuntimeUnavailableError, or KeyboardInterrupt after Ctrl-C.
    """
    hints = {
        # The default is bfloat16 if the processor has it, which changes 0.7 % of the labels.
        "INFERENCE_PRECISION_HINT": number_format,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "PERFORMANCE_HINT": "LATENCY",
        # With pinning, all processes on a machine would use the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    if not few_sizes:
        # By default, kernels are kept for up to 5,000 pairs of layer and size, and the canvases have hundreds of sizes:
        # memory grew by 400 MB during one slide. Without them, a run takes 5 % more processor time
        # (docs/benchmarks/speed.md).
        hints["CPU_RUNTIME_CACHE_CAPACITY"] = 0
    try:
        with _kept_interrupts():
            openvino = load_openvino()
            with torch.no_grad(), warnings.catch_warnings(), _own_logging():
                # The warnings are about sizes that become constants. The constructor compares two sizes.
                warnings.simplefilter("ignore")
                # Trace a function, not the module: then the weights are constants and torch does not search the modules
                # for methods, which takes half of the time. Constants must not require gradients.
                network.requires_grad_(False)
                function = lambda *maps: network(*maps)  # noqa: E731, PLW0108 - torch checks for a module
                traced = torch.jit.trace(function, tuple(map(torch.zeros_like, examples)), check_trace=False)
                model = openvino.convert_model(traced, input=[_any_size(openvino, example) for example in examples])
            return openvino.Core().compile_model(model, "CPU", hints)
    except Exception as error:
        # Tracing, conversion and compilation raise different errors.
        raise RuntimeUnavailableError(
            f"runtime openvino: does not support this model ({_reason(error)}); use runtime torch"
        ) from error


def _any_size(openvino: Any, example: Tensor) -> Any:
    """Return OpenVINO's description of arguments like the example, but of any number and size."""
    if example.dtype == torch.uint8:
        return [-1, -1, -1, example.shape[3]], openvino.Type.u8
    return [-1, example.shape[1], -1, -1], openvino.Type.f32


@contextmanager
def _kept_interrupts() -> Iterator[None]:
    """At the end, raise what the handler of SIGINT raised within this context, even if it was replaced or ignored.

    OpenVINO calls Python functions from C++, where a KeyboardInterrupt becomes an ordinary error.
    """
    former = signal.getsignal(signal.SIGINT)
    # Other threads get no signals. A handler that is not callable raises nothing.
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    raised: list[BaseException] = []

    def keeping(number: int, frame: FrameType | None) -> None:
        try:
            former(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    signal.signal(signal.SIGINT, keeping)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if raised:
            raise raised[0]


@contextmanager
def _own_logging() -> Iterator[None]:
    """Restore the root logger afterwards. A failed conversion leaves it disabled."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _reason(error: Exception) -> str:
    """Return the most useful line of a long error message."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("No conversion rule")), lines[-1])[:300]
