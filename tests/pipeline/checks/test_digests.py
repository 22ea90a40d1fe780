from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks.digests import changed_files
from pipeline.checks.result import broken_rules

TOO_LONG = "x" * 300


def test_an_output_whose_name_no_file_can_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "map.ome.zarr").mkdir()
    run = {"outputs": ["run.json", TOO_LONG, "map.ome.zarr", "preview.png"], "digests": {}}
    found = changed_files(tmp_path, run)
    assert found[tmp_path / TOO_LONG] == ["cannot be read: File name too long"]
    assert found[tmp_path / "preview.png"] == ["is missing"]


@pytest.mark.parametrize("size", [float("inf"), "5", True, None])
def test_a_size_that_is_not_a_number_of_bytes_is_an_error(tmp_path: Path, size: Any) -> None:
    digests = {"preview.png": {"sha256": "0" * 64, "bytes": size}}
    with pytest.raises(TypeError, match="is not a number of bytes"):
        changed_files(tmp_path, {"outputs": ["preview.png"], "digests": digests})


@pytest.mark.parametrize(
    ("outputs", "size", "message"),
    [([TOO_LONG], 1, "cannot be read: File name too long"), (["preview.png"], float("inf"), "not a number of bytes")],
)
def test_a_damaged_record_is_a_finding(tmp_path: Path, outputs: list[str], size: float, message: str) -> None:
    facts = {"preview.png": {"sha256": "0" * 64, "bytes": size}}
    run = {"outputs": outputs, "digests": facts, "polygons": 1, "class_areas_mm2": {}}
    (tmp_path / "slide").mkdir()
    (tmp_path / "slide" / "run.json").write_text(json.dumps(run))
    (tmp_path / "summary.csv").write_text("slide,status\nslide,done\n")
    assert message in str(broken_rules(tmp_path))
