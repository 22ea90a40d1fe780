"""Which runtime computes the networks: PyTorch, or on a CPU OpenVINO, which takes about half the time.

Imports no torch, so that a command line can check its settings at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from models.errors import RuntimeUnavailableError

Precision = Literal["float32", "bf16", "fp16"]
"""Number format of the networks; bf16 and fp16 by torch's autocast."""
Runtime = Literal["torch", "openvino"]
RuntimeName = Literal["auto", "torch", "openvino"]
"""What a user asks for."""


def choose_runtime(name: RuntimeName, device: str, precision: str) -> Runtime:
    """Return the runtime of that name; "auto" takes OpenVINO where it is installed, for float32 on the device "cpu".

    Raises RuntimeUnavailableError where OpenVINO is asked for and cannot be used.
    """
    if name == "torch":
        return name
    if name not in ("auto", "openvino"):
        raise RuntimeUnavailableError(f"unknown runtime {name!r}; use auto, torch or openvino")
    fits, installed = device == "cpu" and precision == "float32", find_spec("openvino") is not None
    if name == "auto":
        return "openvino" if fits and installed else "torch"
    if not fits:
        raise RuntimeUnavailableError(
            f"runtime openvino: it computes float32 on the CPU only, the device is {device} and the precision "
            f"{precision}; use runtime torch or auto"
        )
    if not installed:
        raise RuntimeUnavailableError(
            "runtime openvino: the package is not installed; pip install 'wsi-segment[openvino]', or use runtime torch"
        )
    return name
