"""Cases of parametrized tests, and conditions of tests."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from _pytest.mark import ParameterSet

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def full(*values: object) -> ParameterSet:
    """Return a case that only `pytest -m full` runs."""
    return pytest.param(*values, marks=pytest.mark.full)
