"""Which runtime computes the networks: PyTorch, or on a CPU OpenVINO, which takes about half the time.

Imports no torch, so that a command line can check its settings at once.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any, Literal

from models.errors import RuntimeUnavailableError

Precision = Literal["float32", "bf16", "fp16"]
"""Number format of the networks; bf16 and fp16 by torch's autocast, or OpenVINO's."""
Runtime = Literal["torch", "openvino"]
RuntimeName = Literal["auto", "torch", "openvino"]
"""What a user asks for."""

BATCH_SIZE = 8
CUDA_BATCH_SIZE = 32
"""Tiles per call of a network where nothing was asked for; the second was not measured."""


def choose_runtime(name: RuntimeName, device: str, precision: str) -> Runtime:
    """Return the runtime of that name; "auto" takes OpenVINO where it is installed, on the device "cpu", for formats
    that this machine's processor computes in.

    Raises RuntimeUnavailableError where OpenVINO is asked for and cannot be used.
    """
    if name == "torch":
        return name
    if name not in ("auto", "openvino"):
        raise RuntimeUnavailableError(f"unknown runtime {name!r}; use auto, torch or openvino")
    installed = find_spec("openvino") is not None
    if name == "auto":
        return "openvino" if device == "cpu" and installed and _computes(precision) else "torch"
    if device != "cpu":
        raise RuntimeUnavailableError(
            f"runtime openvino: it runs on the CPU only and the device is {device}; use runtime torch or auto"
        )
    if not installed:
        raise RuntimeUnavailableError(
            "runtime openvino: the package is not installed; pip install 'wsi-segment[openvino]', or use runtime torch"
        )
    if not _computes(precision):
        raise RuntimeUnavailableError(
            f"runtime openvino: this machine's processor does not compute in {precision}; use precision float32, or "
            f"runtime torch"
        )
    return name


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry, which at every import writes to the home folder and calls its maker."""
    modules: dict[str, Any] = sys.modules
    if "openvino" not in modules:
        modules.setdefault("openvino_telemetry", None)  # an ImportError, for which openvino has a stub
    return importlib.import_module("openvino")


def _computes(precision: str) -> bool:
    """Whether OpenVINO has the processor compute in that format: others it would replace by float32 unasked."""
    names = {"fp16": "FP16", "bf16": "BF16"}
    # Not asked for float32, so that most commands need not load OpenVINO to check their settings.
    return precision not in names or names[precision] in load_openvino().Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )
