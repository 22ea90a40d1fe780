"""Lets torchvision be imported beside a torch it was not built with.

torchvision's Python code registers fake kernels for ``torchvision::nms`` and ``torchvision::qnms`` while it is
imported. Its compiled extension declares these operators; where the extension does not load (a CPU build of torch
beside the registry's CUDA build of torchvision is the usual case) the import fails with "operator torchvision::nms does
not exist". timm and segmentation-models-pytorch import torchvision but use neither operator, so a declaration without a
kernel is enough.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from pathlib import Path

import torch

_SCHEMAS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}

# A torch.library.Library takes its declarations back when it is collected, so it lives as long as this module.
_declared: list[torch.library.Library] = []


def declare_missing_ops() -> list[str]:
    """Declare those of torchvision's operators that its own extension cannot; return their names, empty where none was
    missing.

    Call it before the first import of torchvision. Calling it again does nothing.
    """
    if _has_op("nms") or _load_extension():
        return []
    missing = [name for name in _SCHEMAS if not _has_op(name)]
    # FRAGMENT adds to the namespace without claiming it.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(_SCHEMAS[name])
    _declared.append(library)
    return missing


def _has_op(name: str) -> bool:
    # getattr on torch.ops raises AttributeError for an operator that nobody has declared.
    return hasattr(torch.ops.torchvision, name)


def _load_extension() -> bool:
    """Load torchvision's compiled extension as torchvision itself would; False where there is none that fits this
    torch.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    finder = FileFinder(str(Path(spec.origin).parent), (ExtensionFileLoader, list(EXTENSION_SUFFIXES)))
    extension = finder.find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
