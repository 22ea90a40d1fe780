"""Tests of what QuPath shows of a slide that does not look like the training data."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.familiarity import OPACITY, UNFAMILIAR
from pipeline.results.names import FAMILIARITY
from pipeline.results.record import write_run
from pipeline.viewing.qupath.project import write_project
from tests.pipeline.unfamiliar import WARNING, make_unfamiliar
from tests.pipeline.viewing.qupath.projects import project_of, rows_of


@pytest.mark.full
def test_the_project_states_the_warning_and_has_the_overlay(root: Path) -> None:
    folder = root / "results" / "b"
    make_unfamiliar(folder)
    write_project(root / "results")
    rows = {row["overlays"]: row for row in rows_of(root)}
    assert [unquote(row["warning"]) for row in rows.values()] == ["", WARNING]
    images = {image["imageName"]: image for image in project_of(root)["images"]}
    assert images["b.svs"]["metadata"] == {"Warning of wsi-segment": WARNING}
    assert [image["metadata"] for name, image in images.items() if name != "b.svs"] == [{}]
    maps = root / "results" / "qupath" / "maps" / "b"
    with Image.open(maps / "unfamiliar.png") as picture, Image.open(maps / "0.png") as other:
        assert picture.size == other.size
        rgba_HWC = np.asarray(picture.convert("RGBA"))
    _, width = rgba_HWC.shape[:2]
    assert (rgba_HWC[2:-2, 2 : width // 2 - 2, 3] == 0).all()
    assert (rgba_HWC[2:200, width // 2 + 2 : 316] == [*UNFAMILIAR, OPACITY]).all()


@pytest.mark.full
def test_a_warning_goes_when_the_slide_is_segmented_by_another_model(root: Path) -> None:
    folder = root / "results" / "b"
    run = make_unfamiliar(folder)
    write_project(root / "results")
    identity = run.identity.model_copy(update={"model": "f" * 64})
    write_run(folder, run.model_copy(update={"familiarity": None, "warnings": (), "identity": identity}))
    (folder / FAMILIARITY).unlink()
    write_project(root / "results")
    assert [row["warning"] for row in rows_of(root)] == ["", ""]
    assert all(image["metadata"] == {} for image in project_of(root)["images"])
    assert not (root / "results" / "qupath" / "maps" / "b" / "unfamiliar.png").exists()
