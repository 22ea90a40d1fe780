"""Slides and a small model that all tests of labeling share."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import Bundle
from tests.pipeline.labeling.desks import label_slide
from tests.pipeline.small_bundle import small_bundle


@pytest.fixture(scope="package")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a small model whose patches are 64 px of 1 µm."""
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture(scope="package")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two slides with more than 100 patches each."""
    folder = tmp_path_factory.mktemp("slides")
    return [label_slide(folder / f"{name}.svs", seed) for seed, name in enumerate("ab")]
