"""Make torchvision importable beside a torch that it was not built with.

During its import, torchvision registers fake kernels for the operators ``torchvision::nms`` and ``torchvision::qnms``,
which its compiled extension declares. If the extension does not load, the import fails with "operator torchvision::nms
does not exist". The usual cause is a CPU build of torch beside the default CUDA build of torchvision. timm and
segmentation-models-pytorch import torchvision but use neither operator, so a declaration without a kernel suffices.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}

# A torch.library.Library removes its declarations when it is collected, so it must live as long as this module.
_declared: list[torch.library.Library] = []


def declare_missing_ops() -> None:
    """Declare the operators that torchvision's extension does not declare.

    Call this function before the first import of torchvision. Later calls do nothing.
    """
    if _has_op("nms") or _load_extension():
        return
    # FRAGMENT extends the namespace instead of creating it.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not _has_op(name):
            library.define(schema)
    _declared.append(library)


def _has_op(name: str) -> bool:
    # torch.ops raises AttributeError for an operator that is not declared.
    return hasattr(torch.ops.torchvision, name)


def _load_extension() -> bool:
    """Load the compiled extension as torchvision would, and return False if none fits this torch.

    torchvision 0.29 calls it _C_stable, earlier versions _C. Declaring the same operators again aborts the process.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    finder = FileFinder(str(Path(spec.origin).parent), (ExtensionFileLoader, list(EXTENSION_SUFFIXES)))
    for name in ("_C_stable", "_C"):
        extension = finder.find_spec(name)
        if extension is not None and extension.origin is not None:
            try:
                torch.ops.load_library(extension.origin)
            except OSError:
                return False
            return True
    return False
