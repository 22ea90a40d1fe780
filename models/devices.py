"""The devices that compute networks, by their names in torch, and the copies between them and the host.

The code is the same for every accelerator of torch: CUDA, ROCm (which torch calls "cuda"), XPU and MPS.
"""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.errors import DeviceUnavailableError


def available_devices() -> list[str]:
    """Return the names of this machine's devices: "cpu", then those of the accelerator, such as "cuda:0"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    return ["cpu", *(f"{accelerator}:{number}" for number in range(count))]


def choose_device(name: str) -> torch.device:
    """Return the device with this name: one of `available_devices`, or an accelerator without a number.

    "auto" returns the accelerator if there is one, else the CPU. Raises DeviceUnavailableError if the machine does not
    have the device.
    """
    found = available_devices()
    accelerators = {device.partition(":")[0]: None for device in found[1:]}
    if name == "auto":
        return torch.device(next(iter(accelerators), "cpu"))
    if name not in (*found, *accelerators):
        raise DeviceUnavailableError(
            f"device {name!r} is not available: torch {torch.__version__} finds {', '.join(found)} on this machine; "
            f"use one of them, or auto"
        )
    return torch.device(name)


def processor_name(device: torch.device) -> str:
    """Return the model of the processor that computes networks on a device, with the instruction set of a CPU.

    The kernels, and with them the last bits of an output, depend on it.
    """
    # Apple's GPU has no name of its own: it is a part of the CPU's chip.
    of_device: Any = getattr(torch.get_device_module(device), "get_device_name", None)
    if of_device is None:
        return f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return str(of_device(device))


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory of an accelerator; None if torch does not report it."""
    properties: Any = getattr(torch.get_device_module(device), "get_device_properties", None)
    return None if properties is None else int(properties(device).total_memory)


class Uploads:
    """Copies arrays from the host to one device, on a stream of their own, while the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else torch.Stream(device)
        # Only one thread at a time can enter a stream.
        self._entered = threading.Lock()

    def __call__(self, array: NDArray[Any]) -> Tensor:
        """Return an array of any shape as a tensor on the device, when the copy is complete.

        On a CPU, the tensor shares the array's memory. Elsewhere, the next copy may overwrite the tensor's memory once
        the tensor is gone. Keep the tensor until a result that was computed from it is on the host.
        """
        host = torch.from_numpy(np.ascontiguousarray(array))
        # A blocking copy from ordinary memory: page-locked memory fails on MPS, and copies that do not block return
        # wrong values there (PyTorch issues 86060 and 139550).
        with self._entered, self._stream:
            return host.to(self._device)


def to_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Return tensors of one device as arrays, by a single copy. On a CPU, they share the tensors' memory."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    whole = [tensor.contiguous() for tensor in tensors]
    content = torch.cat([tensor.flatten().view(torch.uint8) for tensor in whole]).cpu()
    parts = content.split([tensor.nbytes for tensor in whole])
    # A part may start at an odd byte, which torch does not view as numbers of several bytes.
    return [
        part.clone().view(tensor.dtype).view(tensor.shape).numpy() for part, tensor in zip(parts, whole, strict=True)
    ]


def compiles_sizes(device: torch.device, *networks: nn.Module) -> bool:
    """Return whether cuDNN would compile kernels of these networks for each size of their input.

    cuDNN 9 compiles depthwise convolutions for each size in each thread. On an H100, the first four canvases of a size
    took 5 s, and the next four 0.03 s (docs/gpu.md). We assume the same of MIOpen, which torch also calls cuDNN.
    """
    layers = (layer for network in networks for layer in network.modules())
    return device.type == "cuda" and any(
        isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers
    )


_before: list[bool] = []
"""What `native_convolutions` found, for each thread that is in it."""
_entering = threading.Lock()


@contextmanager
def native_convolutions(wanted: bool) -> Iterator[None]:
    """Compute convolutions without cuDNN in this context, by torch's own kernels and matrix products, if `wanted`.

    See `compiles_sizes`. The setting applies to the whole process: a network that another thread computes meanwhile
    with cuDNN's TF32 would get float32, or the other way round, depending on the moment.
    """
    if not wanted:
        yield
        return
    with _entering:
        _before.append(_before[0] if _before else torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        with _entering:
            found = _before.pop()
            torch.backends.cudnn.enabled = found and not _before


def _cpu_model() -> str:
    """Return the model of the CPU. On systems without /proc, Python has a shorter name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()
