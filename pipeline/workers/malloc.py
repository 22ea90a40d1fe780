"""How the process keeps freed memory."""

from __future__ import annotations

import ctypes
import sys

from models.runtimes import Runtime

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Freed arrays from this size on go back to the kernel, as the pixels of a block do. PyTorch's activations of a batch
# are smaller; OpenVINO keeps its own, and nothing else that comes and goes with a batch is above 9 MiB.
_MAPPED_BYTES: dict[Runtime, int] = {"torch": 48 << 20, "openvino": 9 << 20}
_KEPT_BYTES: dict[Runtime, int] = {"torch": 256 << 20, "openvino": 64 << 20}
_ARENAS = 2


def keep_freed_memory(runtime: Runtime = "torch") -> bool:
    """Let glibc reuse freed arrays instead of handing them back to the kernel; True where that could be set.

    A network's activations are freed and asked for again with every batch. By default each of them is mapped anew and
    the kernel zeroes its pages: 29 % of the CPU time of a run on two cores (docs/benchmarks/slides.md). Few arenas keep
    the threads from each holding on to freed memory of their own. For programs, not for libraries: it holds for the
    whole process. Called at the start, and again once it is known what computes the networks.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl's C library has no mallopt.
    if mallopt is None:
        return False
    settings = {
        _M_TRIM_THRESHOLD: _KEPT_BYTES[runtime],
        _M_MMAP_THRESHOLD: _MAPPED_BYTES[runtime],
        _M_ARENA_MAX: _ARENAS,
    }
    # A list: all of them are set, also where one cannot be.
    return all([mallopt(option, value) for option, value in settings.items()])  # noqa: C419
