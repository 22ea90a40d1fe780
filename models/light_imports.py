"""Import timm and segmentation-models-pytorch without torch's compiler, which saves 1.4 s of CPU time.

torchvision and timm import `torch._dynamo` only to ask whether a function can be compiled, or to exclude one. They get
a stand-in during their import. Networks on the device "meta", which have shapes but no values, would import the
compiler later to initialize their weights. docs/decisions/0010-workarounds.md has the measurement.
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
    """Import a library that imports torchvision or timm, without `torch._dynamo` if the stand-ins suffice."""
    declare_missing_ops()
    if "torch._dynamo" not in sys.modules:
        try:
            with _stand_ins():
                return importlib.import_module(name)
        except (ImportError, AttributeError):
            pass  # another version of the library uses more of the compiler than the stand-ins offer
    return importlib.import_module(name)


class WithoutUnseenWeights(TorchFunctionMode):
    """Skip the initialization of weights on the device "meta" within this context, because they have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, unless it initializes weights on "meta"."""
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
    """Replace `torch.compiler.disable` for functions that are never compiled."""
    return function if function is not None else _as_it_is
