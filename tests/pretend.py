"""A pretend accelerator, "pretend:0": a device of torch that computes on the CPU and records what moves.

Operations that mix devices fail, as on a GPU, and copies and waits are recorded. Kernels, memory and speed are those of
the CPU. The device stays registered until the process ends and hides a real accelerator, so import this module only in
a process of its own: `python -m tests.pretend_runs`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "pretend"

WAITS = {
    aten._local_scalar_dense.default: "item, bool, int or float of a tensor",
    aten.nonzero.default: "nonzero, or an index by a mask",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.equal.default: "equal",
}
"""Operations whose results a program on the host needs, so that it waits for the device."""

_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


@dataclass
class Record:
    """What a thread did with the device."""

    moves: list[str] = field(default_factory=list)
    """In order: "in" for a copy to the device, "out" for a copy to the host, and the texts of `WAITS`."""
    kernels: int = 0
    """Operations on the device that compute or copy."""


_of_thread = threading.local()


@contextmanager
def recorded() -> Iterator[Record]:
    """Record what this thread does."""
    _of_thread.record = Record()
    try:
        yield _of_thread.record
    finally:
        _of_thread.record = Record()


def _record() -> Record:
    record: Record = getattr(_of_thread, "record", Record())
    return record


class PretendTensor(Tensor):
    """A tensor on the device. `raw` holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    # torch documents this signature, and its stubs have another.
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # In inference mode, torch passes composite operations as they are, such as `to` and `item`. Their own kernel
        # calls simple ones. (`decompose` prefers kernels in Python, which round differently.)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers. Raises RuntimeError if it mixes devices."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return False  # then `Module.to` replaces the parameters instead of their content
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = {id(one.raw): one for one in tensors if isinstance(one, PretendTensor)}
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    _check_and_record(func, tensors, target)
    plain_args, plain_kwargs = pytree.tree_map(
        lambda one: one.raw if isinstance(one, PretendTensor) else one, (args, kwargs)
    )
    if target is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = func(*plain_args, **plain_kwargs)
    if target == "cpu":
        return result
    if func is aten.copy_.default:
        return args[0]
    # A view of a normal tensor is a normal tensor in inference mode too, and torch checks that.
    normal = any(not one.is_inference() for one in there.values())
    with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
        return pytree.tree_map(
            lambda one: (
                (there[id(one)] if id(one) in there else PretendTensor(one)) if isinstance(one, Tensor) else one
            ),
            result,
        )


def _check_and_record(func: Any, tensors: list[Tensor], target: str | None) -> None:
    on_device = [isinstance(one, PretendTensor) for one in tensors]
    if func is aten.copy_.default:
        if on_device[0] != on_device[1]:
            _record().moves.append("in" if on_device[0] else "out")
    elif func is aten._to_copy.default:
        if target is not None and (target == NAME) != on_device[0]:
            _record().moves.append("out" if on_device[0] else "in")
    elif any(on_device) and any(not here and one.ndim for one, here in zip(tensors, on_device, strict=True)):
        # torch lets a number on the CPU take part.
        raise RuntimeError(f"{func} expects its tensors on one device, but found {NAME} and cpu")
    if func in _INDEXED and any(one.dtype is torch.bool for one in tensors[1:]):
        _record().moves.append(WAITS[aten.nonzero.default])
    if func in WAITS:
        _record().moves.append(WAITS[func])
    _record().kernels += not func.is_view


class _Backend:
    """What torch asks of the module of a device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: numbers are drawn on the CPU."""

    def _is_in_bad_fork(self) -> bool:
        return False


# Otherwise `Module.to` with another memory format replaces what torch knows of a parameter, but not `raw`. Convolutions
# would then compute in another layout than on the CPU, whose bits are the same on some processors only.
torch.__future__.set_overwrite_module_params_on_conversion(True)
_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
