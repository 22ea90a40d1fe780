"""A network computed by OpenVINO, which on a CPU takes about half of PyTorch's time for the same labels, and in float16
a quarter.

Shape suffixes: N batch, H and W the image.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import RuntimeUnavailableError
from models.runtimes import Precision, load_openvino

_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "fp16": 0.05, "bf16": 0.5}
"""Of a logit, absolute and relative: the default bundle's differ by 1e-5, 0.01 and 0.1, those of a network that was
converted wrongly by far more."""

_FORMATS: dict[Precision, str] = {"float32": "f32", "fp16": "f16", "bf16": "bf16"}
"""As OpenVINO calls them."""


class OpenVinoNetwork:
    """A network compiled for the CPU, called as the network is: normalised images (N, 3, H, W) -> its output, float32.

    It takes any N, and an image's result depends on nothing but the image. Calls must not overlap. It runs on as many
    threads as torch had when it was made. Nothing is written to the disk.
    """

    def __init__(self, network: nn.Module, size: int, precision: Precision = "float32") -> None:
        """Compile the network, in eval mode, for square images of that side; other shapes are compiled at their first
        call.

        Raises RuntimeUnavailableError where OpenVINO cannot take the network, or makes something else of it.
        """
        self._format = _FORMATS[precision]
        self._network = network
        self._threads = torch.get_num_threads()
        self._compiled: dict[tuple[int, ...], Any] = {}
        example_NCHW = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = network(example_NCHW)
        # Another framework's reader of any network of timm's: what it makes is held against the original.
        tolerance = _TOLERANCES[precision]
        if not torch.allclose(self(example_NCHW), expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise RuntimeUnavailableError(
                "runtime openvino: computes something else than torch for this model; use runtime torch"
            )

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        shape_CHW = tuple(x_NCHW.shape[1:])
        if shape_CHW not in self._compiled:
            self._compiled[shape_CHW] = _compile(self._network, shape_CHW, self._threads, self._format)
        # Always sharing: a call that does not would copy its input over the array that the last one shared.
        outputs = self._compiled[shape_CHW](x_NCHW.contiguous().numpy(), share_inputs=True, share_outputs=False)
        return torch.from_numpy(outputs[0])


def _compile(network: nn.Module, shape_CHW: tuple[int, ...], threads: int, number_format: str) -> Any:
    """Return the network compiled for batches of any size of images of that shape. Raises RuntimeUnavailableError."""
    hints = {
        # Its own choice would be bfloat16 where the processor has it, which changes 0.7 % of the labels.
        "INFERENCE_PRECISION_HINT": number_format,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Processes side by side would all be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        openvino = load_openvino()
        with torch.no_grad(), warnings.catch_warnings(), _own_logging():
            # Sizes become constants, which is right: the shape is.
            warnings.simplefilter("ignore")
            # A function and not the module: its weights are constants, and no module in it is looked at for methods,
            # which takes half of the time. The gradient is switched off, or they could not be constants.
            network.requires_grad_(False)
            function = lambda x_NCHW: network(x_NCHW)  # noqa: E731, PLW0108 - torch looks whether it is a module
            traced = torch.jit.trace(function, torch.zeros(1, *shape_CHW), check_trace=False)
            model = openvino.convert_model(traced, input=[-1, *shape_CHW])
        return openvino.Core().compile_model(model, "CPU", hints)
    except Exception as error:
        # Tracing, converting and compiling each have errors of their own.
        raise RuntimeUnavailableError(
            f"runtime openvino: cannot take this model ({_reason(error)}); use runtime torch"
        ) from error


@contextmanager
def _own_logging() -> Iterator[None]:
    """Keep the root logger as it is: a conversion that fails would leave it silenced."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _reason(error: Exception) -> str:
    """The line of a long message that says most."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("No conversion rule")), lines[-1])[:300]
