from __future__ import annotations

import subprocess
import sys

import pytest


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.full
def test_torchvision_imports_after_the_declaration() -> None:
    code = "from models.torchvision_ops import declare_missing_ops as f; f(); import torchvision; print('imported')"
    assert _python(code) == "imported"


@pytest.mark.full
def test_missing_operators_are_declared_if_the_extension_does_not_load() -> None:
    code = """
import pytest
import torch
from models import torchvision_ops
torchvision_ops._load_extension = lambda: False
before = hasattr(torch.ops.torchvision, "nms")
torchvision_ops.declare_missing_ops()
torchvision_ops.declare_missing_ops()
print(before, torch.ops.torchvision.nms.default._schema)
print(torch.ops.torchvision.qnms.default._schema)
import torchvision
"""
    assert _python(code).splitlines() == [
        "False torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ]


def test_reading_a_card_does_not_import_torch() -> None:
    code = "import sys, models.bundle, models.errors; models.bundle.shipped_bundles(); print('torch' in sys.modules)"
    assert _python(code) == "False"
