"""What the process keeps: freed memory, kernels and imported objects."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from models.runtimes import RUNTIME_FACTS, Runtime

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ARENAS = 2


@contextmanager
def imported_for_good(library: str = "torch") -> Iterator[None]:
    """Import libraries that the process needs until it exits, and exclude their objects from garbage collection.

    torch, OpenVINO and the others create 500,000 objects. Without this context, Python's collector scans them
    several times during the import (0.4 s of processor time), and again in every full collection of a run.
    """
    if library in sys.modules:  # nothing to import, and what is garbage now must not be kept
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def keep_freed_memory(runtime: Runtime = "torch") -> bool:
    """Let glibc reuse freed arrays instead of returning them to the kernel. Return whether that was possible.

    A network frees and allocates its activations with every batch. By default, glibc maps each of them anew and the
    kernel zeroes its pages: 29 % of the CPU time of a run on two cores (docs/benchmarks/slides.md). With few arenas,
    the threads do not each keep freed memory of their own. Call this from programs, not from libraries, because it
    changes the whole process: at the start, and again when the runtime is known.

    Also stop oneDNN from keeping PyTorch's kernels. By default it keeps up to 1,024, each for one canvas size: 2.7 GB
    on CMU-1 (docs/benchmarks/lattice.md).
    """
    # oneDNN reads this variable at the first convolution, so call this function before any network runs.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl's C library has no mallopt.
    if mallopt is None:
        return False
    facts = RUNTIME_FACTS[runtime]
    options = {
        _M_TRIM_THRESHOLD: facts.kept_bytes,
        _M_MMAP_THRESHOLD: facts.mapped_bytes,
        _M_ARENA_MAX: _ARENAS,
    }
    # A list, so that a failure of one option does not prevent the others.
    return all([mallopt(option, value) for option, value in options.items()])  # noqa: C419
