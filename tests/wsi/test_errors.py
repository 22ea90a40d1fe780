"""Which errors mean that the machine has too little of something."""

from __future__ import annotations

import errno

import pytest

from wsi.errors import Shortage, SlideReadError, shortage


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "out of memory"),
        (Exception("alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 8 bytes"), "out of memory"),
        (RuntimeError("Exception from src/inference/src/cpp/core.cpp:109:\nstd::bad_alloc"), "out of memory"),
        (RuntimeError("bad allocation"), "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("can't start new thread"), "out of threads"),
        (RuntimeError("Resource temporarily unavailable"), "out of threads"),
        (OSError(errno.EMFILE, "Too many open files"), "out of file handles"),
        (OSError(errno.ENFILE, "Too many open files in system"), "out of file handles"),
        (OSError("mmap: Cannot allocate memory"), "out of memory"),
        # No number of bytes would help.
        (ImportError("libx.so: cannot allocate memory in static TLS block"), None),
        # The name of a file states nothing.
        (FileNotFoundError(errno.ENOENT, "No such file", "out of memory.svs"), None),
        (SlideReadError("out of memory.svs: cannot be read"), None),
        (ValueError("damaged"), None),
        (None, None),
    ],
)
def test_a_shortage_is_recognized_by_class_number_or_text(error: Exception | None, what: Shortage | None) -> None:
    assert shortage(error) == what


def test_a_shortage_counts_if_it_caused_another_error() -> None:
    error = SlideReadError("a.svs: cannot be read")
    error.__cause__ = ValueError("a tile")
    assert shortage(error) is None
    error.__cause__.__context__ = RuntimeError("can't start new thread")
    assert shortage(error) == "out of threads"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cairo: out of memory", None),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", None),
        ("Insufficient memory (case 4)", None),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.", None),
        ("failed to allocate 8 bytes", None),
        ("std::bad_alloc", "out of memory"),
        ("libx.so: failed to map segment from shared object", "out of memory"),
        ("can't start new thread", "out of threads"),
        ("damaged", None),
    ],
)
def test_texts_that_a_damaged_file_can_cause_do_not_count_while_decoding(text: str, what: Shortage | None) -> None:
    assert shortage(RuntimeError(text), decoding=True) == what
    assert shortage(MemoryError(text), decoding=True) == "out of memory"
