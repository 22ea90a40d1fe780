"""Keeps torch's compiler out of a start: it takes a second to import, and nothing here compiles.

torchvision and timm import `torch._dynamo` only to ask whether something could be compiled, or to say that it shall not
be. Both get a stand-in for as long as they are imported. Networks that are built on the device "meta", to look at their
shapes, would import it once more to draw random weights that nobody sees.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.torchvision_ops import declare_missing_ops


def import_light(name: str) -> Any:
    """Import a library that imports torchvision or timm, without `torch._dynamo` unless it needs more of that."""
    declare_missing_ops()
    if "torch._dynamo" not in sys.modules:
        try:
            with _stand_ins():
                return importlib.import_module(name)
        except (ImportError, AttributeError):
            pass  # another version, which wants more of the compiler than the stand-ins have
    return importlib.import_module(name)


class WithoutUnseenWeights(TorchFunctionMode):
    """Within this context, weights on the device "meta" are not initialised: they have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for each function of torch."""
        kwargs = kwargs or {}
        weight = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__module__", "") == "torch.nn.init" and isinstance(weight, Tensor) and weight.is_meta:
            return weight
        return func(*args, **kwargs)


@contextmanager
def _stand_ins() -> Iterator[None]:
    names = ("torch._dynamo", "torch._dynamo.utils")
    package, utilities = (ModuleType(name) for name in names)
    vars(package)["utils"] = utilities
    vars(utilities)["is_compile_supported"] = _is_compile_supported
    disable = torch.compiler.disable
    sys.modules.update(zip(names, (package, utilities), strict=True))
    vars(torch.compiler)["disable"] = _as_it_is
    try:
        yield
    finally:
        vars(torch.compiler)["disable"] = disable
        for name in names:
            sys.modules.pop(name, None)


def _is_compile_supported(device: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device))


def _as_it_is(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """`torch.compiler.disable` for functions that nobody compiles."""
    return function if function is not None else _as_it_is
