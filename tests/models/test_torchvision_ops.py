from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from models import torchvision_ops


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
import torch
from models import torchvision_ops

def fails(path):
    raise OSError("undefined symbol")

torch.ops.load_library = fails  # torchvision uses it, too
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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["_C.so", "image.so"], ["_C.so"]),
        (["_C.abi3.so", "_C_other.so"], ["_C.abi3.so"]),
        (["_C_stable.so", "image_stable.so", "_C.so"], ["_C_stable.so"]),
        (["_C.cpython-27-x86_64-linux-gnu.so"], []),
    ],
)
def test_the_extension_is_found_under_the_names_of_all_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], expected: list[str]
) -> None:
    for file in (*files, "__init__.py"):
        (tmp_path / file).touch()
    spec = ModuleSpec("torchvision", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("models.torchvision_ops.find_spec", lambda _: spec)
    loaded: list[str] = []
    monkeypatch.setattr("torch.ops.load_library", lambda path: loaded.append(Path(path).name))
    assert torchvision_ops._load_extension() is bool(expected)
    assert loaded == expected


def test_reading_a_card_does_not_import_torch() -> None:
    code = "import sys, models.bundle, models.errors; models.bundle.shipped_bundles(); print('torch' in sys.modules)"
    assert _python(code) == "False"
