"""A small data set that the tests of trainings share."""

from __future__ import annotations

import pytest

from pipeline.training.dataset import Dataset, load_dataset
from tests.textures import write_textures


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_textures(tmp_path_factory.mktemp("textures"), train=5, val=2, test=2, size=64))
