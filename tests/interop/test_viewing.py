"""Tests of the examples for other programs in docs/viewing.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.interop.conftest import Shown
from tests.interop.vitessce import CONFIGURATION
from tests.pipeline.fakes import labels_of
from tests.repository import REPOSITORY

SECTION = (REPOSITORY / "docs" / "viewing.md").read_text(encoding="utf-8").split("## Other programs")[1]
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL) if "127.0.0.1" not in code]
"""The examples that do not need a server."""


@pytest.mark.full
@pytest.mark.parametrize("code", EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_each_python_example_runs_in_the_folder_above_the_results(
    three_classes: Shown, tmp_path: Path, code: str
) -> None:
    (tmp_path / "results").symlink_to(three_classes.folder.parent)
    environment = os.environ | {"MPLBACKEND": "Agg"}
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"class-{k}" in done.stdout for k in range(3))
    if "classes.tif" in code:
        with tifffile.TiffFile(tmp_path / "classes.tif") as tiff:
            np.testing.assert_array_equal(tiff.asarray(), labels_of(three_classes.folder))
            numerator, denominator = tiff.pages.first.tags["XResolution"].value
            assert numerator / denominator == pytest.approx(1e4 / 4)


def test_docs_contain_both_examples() -> None:
    assert sum("geopandas" in code for code in EXAMPLES) == 1
    assert sum("tifffile" in code for code in EXAMPLES) == 1
    assert len(EXAMPLES) == 2


def test_the_documented_vitessce_configuration_is_the_tested_one() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL)
    shown = json.loads(text)
    assert shown == CONFIGURATION | {"datasets": shown["datasets"]}
    (dataset,) = shown["datasets"]
    assert [file["fileType"] for file in dataset["files"]] == ["image.ome-zarr"]
