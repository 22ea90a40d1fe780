"""The runtimes that compute the networks, PyTorch and OpenVINO: which one to use, and what each of them needs.

On a CPU, OpenVINO takes about half the time of PyTorch. This module does not import torch, so that a command can check
its settings at once.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from models.errors import RuntimeUnavailableError

Precision = Literal["float32", "bf16", "fp16"]
"""Number format of the networks. PyTorch computes bf16 and fp16 with autocast."""
Runtime = Literal["torch", "openvino"]
"""What computes the networks."""
RuntimeName = Literal["auto", "torch", "openvino"]
"""A runtime as a user asks for it."""

OUTPUT_STRIDES = (4, 2, 1)
"""Model pixels per pixel of a predictor's output. The first is the networks' own, the others are interpolated."""

BATCH_SIZE = 1
"""Default number of canvases per call of a network."""
ACCELERATOR_BATCH_SIZE = 4
"""The same on a GPU."""


STREAMS = 2
"""Canvases that OpenVINO computes at a time if the first stages of the networks run in windows. Two threads that
compute one canvas each need less processor time than two threads that share one."""

AHEAD = 1
"""Windows of the first stages, or parts of cores for the segmenter, that Python prepares while all streams compute.
Otherwise, a stream would wait until Python has taken its output and prepared its next input. Larger items take more
memory (about 50 MB for a window of the backbone) and save no measurable time."""

CONTEXT = 16
"""Pixels around a canvas that the first stages read. Stages whose padding reaches farther run on whole canvases. A
multiple of 16."""

FEATURE_BYTES_PER_PX = 28
"""Bytes per pixel of the maps that a classifier and a segmenter share (`models.shared_stages`): at most 64 channels for
16 pixels and 256 for 256 pixels in EfficientNets with four stages, except L2. The latter are there up to three times:
by window, by canvas, and while windows are joined. `colorectal-tissue` has 11."""


@dataclass(frozen=True)
class RuntimeFacts:
    """The memory that a process needs for a runtime, and how its allocator should treat freed memory."""

    process_bytes: int
    """Resident memory without pixels: Python, the libraries, the networks, and what the allocator keeps."""
    activation_bytes_per_px: int
    """Activations of both networks in all streams, per pixel of a canvas."""
    shared_activation_bytes_per_px: int
    """Activations of a shared backbone in all streams, per pixel of a window (`models.backbone_windows`).
    EfficientNet-Lite0 has 240 with OpenVINO and 128 with PyTorch, and Lite3 a third more. On a CPU, the decoder runs in
    small parts."""
    mapped_bytes: int
    """Arrays of at least this size return to the kernel when they are freed."""
    kept_bytes: int
    """Freed memory that the allocator keeps for the next array."""


# Peaks of whole slides stay below the bound of `pipeline.slide.plan` with these sizes (docs/benchmarks/lattice.md).
RUNTIME_FACTS: dict[Runtime, RuntimeFacts] = {
    # PyTorch allocates and frees its activations for every batch. Most are smaller than 48 MiB.
    "torch": RuntimeFacts(
        process_bytes=1500 << 20,
        activation_bytes_per_px=550,
        shared_activation_bytes_per_px=190,
        mapped_bytes=48 << 20,
        kept_bytes=256 << 20,
    ),
    # OpenVINO keeps its activations. The arrays of a canvas have a size of their own, so kept ones leave holes.
    "openvino": RuntimeFacts(
        process_bytes=900 << 20,
        activation_bytes_per_px=710,
        shared_activation_bytes_per_px=340,
        mapped_bytes=4 << 20,
        kept_bytes=64 << 20,
    ),
}


@dataclass(frozen=True)
class Compute:
    """How networks are computed, with every choice made."""

    device: str
    """A torch device, such as "cpu" or "cuda:1"."""
    precision: Precision
    runtime: Runtime
    batch_size: int
    """Canvases per call of a network."""
    threads: int
    """CPU threads of a network."""
    processor: str
    """Model and instruction set of the CPU, or model of the GPU: `models.devices.processor_name`."""


def default_batch_size(device: str) -> int:
    """Return the number of canvases per call of a network on a device, such as "cpu" or "cuda:1"."""
    return BATCH_SIZE if device == "cpu" else ACCELERATOR_BATCH_SIZE


def choose_runtime(name: RuntimeName, device: str, precision: str) -> Runtime:
    """Return the runtime to use.

    "auto" returns OpenVINO if it is installed, the device is "cpu" and the processor computes in `precision`.
    Raises RuntimeUnavailableError if OpenVINO is requested and one of these conditions is not met.
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
        check_precision(device, precision)  # otherwise, the advice below would be refused too
        raise RuntimeUnavailableError(
            f"runtime openvino: this machine's processor does not compute in {precision}; use precision float32, or "
            f"runtime torch"
        )
    return name


def check_precision(device: str, precision: str) -> None:
    """Raise RuntimeUnavailableError if the device would emulate this number format.

    PyTorch emulates fp16 and bf16 on processors without instructions for them: on CMU-1, fp16 took more than 20 times
    as long as float32. Graphics cards compute in both, or emulate bf16 at about the speed of float32.
    """
    if device != "cpu" or has_instructions_for(precision):
        return
    others = [name for name in ("bf16", "fp16") if name != precision and has_instructions_for(name)]
    raise RuntimeUnavailableError(
        f"precision {precision}: this machine's processor has no instructions for it and would take many times longer "
        f"than with float32; use {' or '.join(['float32', *others])}"
    )


_INSTRUCTIONS = {
    "fp16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}),
}
"""Flags of /proc/cpuinfo, on x86 and ARM, of processors that compute in a number format."""


def has_instructions_for(precision: str) -> bool:
    """Return whether this machine's processor computes in a number format; True if that cannot be found out."""
    flags = processor_flags()
    return precision not in _INSTRUCTIONS or flags is None or bool(_INSTRUCTIONS[precision] & flags)


@cache
def processor_flags() -> frozenset[str] | None:
    """Return the processor's flags in /proc/cpuinfo; None if the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), None)
    return None if line is None else frozenset(line.partition(":")[2].split())


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry, which writes to the home folder and connects to its vendor."""
    modules: dict[str, Any] = sys.modules
    if "openvino" not in modules:
        modules.setdefault("openvino_telemetry", None)  # raises an ImportError, for which openvino has a stub
    return importlib.import_module("openvino")


def _computes(precision: str) -> bool:
    """Return whether the processor computes in that format. OpenVINO silently replaces other formats by float32."""
    names = {"fp16": "FP16", "bf16": "BF16"}
    # float32 needs no check, so most commands do not load OpenVINO to check their settings.
    return precision not in names or names[precision] in load_openvino().Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )
