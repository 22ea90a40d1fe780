"""Segmented slides for the projects of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.slide.recipe import segment_slide
from tests.pipeline.fakes import SMALL, color_predictor, region_slide
from tests.pipeline.viewing.qupath.projects import NAMES, record_path


@pytest.fixture(scope="package")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `slides` and their `results`."""
    root = tmp_path_factory.mktemp("a b ü")
    (root / "slides").mkdir()
    for name in NAMES:
        region_slide(root / "slides" / name, levels=(1,) if name == NAMES[0] else (1, 4))
        segment_slide(root / "slides" / name, root / "results", color_predictor(), SMALL)
    return root


@pytest.fixture
def root(segmented: Path, tmp_path: Path) -> Path:
    """Return a copy of the segmented slides whose results record the paths of the copied slides."""
    root = tmp_path / "a b ü"
    shutil.copytree(segmented, root)
    for name in NAMES:
        record_path(root / "results" / Path(name).stem, root / "slides" / name)
    return root
