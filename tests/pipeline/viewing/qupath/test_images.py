"""The slides of a project are found again wherever they have moved."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from pipeline.viewing.qupath.project import write_project
from tests.pipeline.fakes import run_of
from tests.pipeline.viewing.qupath.projects import NAMES, file_of, project_of, rows_of, slides_of


@pytest.mark.full
def test_slides_that_moved_with_the_project_are_found_and_keep_their_ids(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_project(root / "results")
    before = project_of(root)
    moved = root.rename(root.with_name("moved & more"))
    write_project(moved / "results")
    assert slides_of(moved) == {1: moved / "slides" / NAMES[0], 2: moved / "slides" / NAMES[1]}
    assert file_of(project_of(moved)["uri"]) == moved / "results" / "qupath" / "project.qpproj"
    assert [i["entryID"] for i in project_of(moved)["images"]] == [i["entryID"] for i in before["images"]]
    assert caplog.records == []


def test_a_missing_slide_is_added_with_a_warning_that_names_the_remedy(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = root / "slides" / NAMES[1]
    place.rename(root / "elsewhere.svs")
    with caplog.at_level(logging.WARNING):
        write_project(root / "results")
    (warning,) = caplog.messages
    assert f"b: the slide is not at {place}" in warning
    assert "--slides" in warning
    assert slides_of(root)[2] == place


def test_a_slide_that_moved_is_found_by_its_content_and_not_by_its_name_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_project(root / "results")
    archive = root / "archive"
    for number, content in enumerate([b"another patient's", (root / "slides" / NAMES[1]).read_bytes()]):
        (archive / str(number)).mkdir(parents=True)
        (archive / str(number) / NAMES[1]).write_bytes(content)
    (root / "slides" / NAMES[1]).unlink()
    write_project(root / "results", slides=archive)
    assert slides_of(root) == {1: root / "slides" / NAMES[0], 2: archive / "1" / NAMES[1]}
    assert caplog.records == []

    (archive / "1" / NAMES[1]).unlink()
    with caplog.at_level(logging.WARNING):
        write_project(root / "results", slides=archive)
    assert "1 files of that name have other contents" in caplog.text


def test_two_results_of_one_slide_keep_an_image_each(root: Path) -> None:
    shutil.copytree(root / "results" / "b", root / "results" / "c")
    for old in (root / "results" / "c").glob("b.*"):
        old.rename(old.with_name(f"c{old.name[1:]}"))
    for _ in range(2):
        path = write_project(root / "results")
        assert [(row["entryID"], row["name"]) for row in rows_of(root)[1:]] == [("2", "b.svs"), ("3", "c.svs")]
        assert slides_of(root)[2] == slides_of(root)[3] == root / "slides" / "b.svs"
    project = project_of(root)
    project["images"][1]["imageName"] = "renamed"
    path.write_text(json.dumps(project), encoding="utf-8")
    write_project(root / "results")
    assert [row["entryID"] for row in rows_of(root)] == ["1", "2", "3"]


def test_results_without_the_path_of_their_slide_need_the_folder_of_slides(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = root / "results" / "b"
    run = run_of(folder)
    del run["slide"]["path"]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    write_project(root / "results", slides=root / "slides")
    assert slides_of(root)[2] == root / "slides" / "b.svs"
    assert caplog.records == []
    write_project(root / "results")
    assert "--slides" in caplog.text
    assert len(project_of(root)["images"]) == 2 + 1  # no way to tell that it is the same slide
