"""Choose how a machine computes networks. `models.runtimes` has what can be known without importing torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from models.devices import choose_device, processor_name
from models.errors import ShortageError, reason_of
from models.runtimes import Compute, Precision, RuntimeName, choose_runtime, default_batch_size
from wsi.errors import shortage


def choose_compute(
    *,
    device: str = "auto",
    precision: Precision = "float32",
    runtime: RuntimeName = "torch",
    batch_size: int | None = None,
) -> Compute:
    """Return how this machine computes networks if these settings are requested.

    `device` is resolved by `choose_device` and `runtime` by `choose_runtime`. `batch_size` None stands for
    `default_batch_size`. Raises DeviceUnavailableError, RuntimeUnavailableError, and ValueError for an unknown
    precision or a batch size below 1.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; use float32, bf16 or fp16")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    chosen = choose_device(device)
    return Compute(
        device=str(chosen),
        precision=precision,
        runtime=choose_runtime(runtime, chosen.type, precision),
        batch_size=batch_size or default_batch_size(str(chosen)),
        threads=_torch_threads(),
        processor=processor_name(chosen),
    )


_loading = threading.Lock()


@contextmanager
def loading() -> Iterator[None]:
    """Load networks with one thread of torch. Loads of several threads of the process follow one another.

    Raises ShortageError instead of any error that too little memory, threads or file handles caused.
    """
    with _loading, one_torch_thread(torch.get_num_threads()):
        try:
            yield
        except Exception as error:
            what = shortage(error)
            if what is None:
                raise
            raise ShortageError(
                f"the model cannot be loaded: {what} ({reason_of(error)}); end other programs, or raise the "
                f"limits of this process or container"
            ) from error


@contextmanager
def one_torch_thread(threads: int) -> Iterator[None]:
    """Compute torch's operations in the calling thread within this context; afterwards, torch has `threads` threads.

    For each short operation, torch would wake threads that then wait for more work in a loop, which takes up to a tenth
    of the processor time of a run. The number of threads belongs to the calling thread. A thread whose first operation
    of torch falls into this context has one thread, too.
    """
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _torch_threads() -> int:
    """Return the number of threads that torch has while no model loads."""
    with _loading:
        return torch.get_num_threads()
