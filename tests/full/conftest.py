"""Every test of this folder attacks the program, so all of them are marked `full`."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook gets those of all folders."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.full)
