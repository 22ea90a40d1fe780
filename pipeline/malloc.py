"""How the process keeps freed memory."""

from __future__ import annotations

import ctypes
import sys

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Activations of a batch are smaller; the pixels of a block are larger and go back to the kernel.
_MAPPED_BYTES = 48 << 20
_KEPT_BYTES = 64 << 20
_ARENAS = 2


def keep_freed_memory() -> bool:
    """Let glibc reuse freed arrays instead of handing them back to the kernel; True where that could be set.

    A network's activations are freed and asked for again with every batch. By default each of them is mapped anew and
    the kernel zeroes its pages: 29 % of the CPU time of a run on two cores (docs/benchmarks/slides.md). Few arenas keep
    the threads from each holding on to freed memory of their own. For programs, not for libraries: it holds for the
    whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl's C library has no mallopt.
    if mallopt is None:
        return False
    settings = {_M_TRIM_THRESHOLD: _KEPT_BYTES, _M_MMAP_THRESHOLD: _MAPPED_BYTES, _M_ARENA_MAX: _ARENAS}
    # A list: all of them are set, also where one cannot be.
    return all([mallopt(option, value) for option, value in settings.items()])  # noqa: C419
