from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from models.light_imports import WithoutUnseenWeights
from tests.cases import full

LOAD = """
import sys
from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.predictor import Predictor
Predictor.from_bundle(load_bundle(DEFAULT_BUNDLE), device="cpu", runtime={runtime!r})
print(sorted({{"torch._dynamo", "sympy", "timm", "torchvision"}} & set(sys.modules)))
"""

WITHOUT_STAND_INS = """
from contextlib import contextmanager
import models.light_imports as light

@contextmanager
def lacking():
    raise ImportError("cannot import name 'other' from 'torch._dynamo'")
    yield

light._stand_ins = lacking
print(light.import_light("timm").__name__)
"""

AFTERWARDS = """
import torch
from models.light_imports import import_light
disable = torch.compiler.disable
import_light("timm")
from torchvision.ops.roi_align import is_compile_supported
from torch._dynamo.utils import is_compile_supported as real
print(torch.compiler.disable is disable, is_compile_supported("cpu") == real("cpu"), torch._dynamo.utils is not None)
"""


def output_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("runtime", [full("torch"), full("openvino")])
def test_a_model_loads_without_the_compiler_of_torch(runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    assert output_of(LOAD.format(runtime=runtime)) == "['timm', 'torchvision']"


@pytest.mark.full
def test_a_library_that_needs_more_of_the_compiler_gets_the_real_one() -> None:
    assert output_of(WITHOUT_STAND_INS) == "timm"


@pytest.mark.full
def test_the_compiler_is_restored_afterwards() -> None:
    assert output_of(AFTERWARDS) == "True True True"


def test_only_weights_on_meta_are_not_initialized() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 2)
    torch.manual_seed(0)
    with WithoutUnseenWeights():
        unseen, seen = nn.Linear(5, 4, device="meta"), nn.Linear(3, 2)
    assert unseen.weight.is_meta
    assert torch.equal(seen.weight, expected.weight)
    assert torch.equal(seen.bias, expected.bias)
