"""Cases of parametrized tests."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def full(*values: object) -> ParameterSet:
    """Return a case that only `pytest -m full` runs."""
    return pytest.param(*values, marks=pytest.mark.full)
