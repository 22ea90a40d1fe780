"""A working folder in which the command computes with known networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.predictor import Predictor
from tests.pipeline.fakes import color_predictor


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a working folder, and use the color model instead of a bundle's networks for `invoke`."""
    monkeypatch.setattr("pipeline.cli.segment.SCHEDULER_OF_SEVERAL", None)
    monkeypatch.setattr(Predictor, "from_bundle", lambda *_, **__: color_predictor())
    monkeypatch.chdir(tmp_path)
    return tmp_path
