"""Which files of a folder are slides, and which are left out with a warning."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.batch.collect import collect_jobs
from pipeline.errors import ConfigError


def left_out(root: Path, caplog: pytest.LogCaptureFixture, *names: str) -> list[str]:
    """Make files of these names, search their folder twice, and return the warnings."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    caplog.clear()
    jobs = collect_jobs([root, root], recursive=True)
    assert all(job.path.suffix in (".tif", ".svs", ".vms") for job in jobs)
    return [record.getMessage() for record in caplog.records]


def test_slides_in_other_formats_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = ("one.VSI", "1.isyntax", "10.qptiff", "deep/scan.jp2")
    assert left_out(tmp_path, caplog, "1.svs", "2.tif", "deep/3.tif", *others) == [
        "files skipped because their extension is not that of a readable slide format: 4, such as 1.isyntax; convert "
        "them to TIFF"
    ]


@pytest.mark.parametrize(
    "files",
    [
        ("notes.txt", "list.csv", "run.json", "regions.geojson", "project.xml", ".hidden.vsi", "no-ending"),
        ("a.svs", "a.jpg", "a_macro.png", "a (label).jpeg", "aMacro.jpg", "thumb_a.jpg"),
        ("a.ome.tif", "a.png"),
        ("a.ome.tif", "a.vsi", "b.tif", "b.qptiff"),
        ("thumbnail.jpg", "cohort_overview.png", "logo.png"),
        ("x 12.05.vms", "x 12.05(0,1).jpg", "x 12.05_map2.jpg"),
        ("results/a/preview.png", "labels/patches/0.png"),
    ],
)
def test_pictures_and_converted_slides_are_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: tuple[str, ...]
) -> None:
    assert left_out(tmp_path, caplog, "slide.svs", *files) == []


def test_a_folder_with_pictures_alone_is_an_error_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="no slides in this folder"):
        left_out(tmp_path, caplog, "a.png")
    assert caplog.text == ""


def problems(root: Path) -> list[str]:
    return [job.problem for job in collect_jobs([root])]


def test_what_cannot_be_a_slide_has_a_problem(tmp_path: Path) -> None:
    pipe, link, slide, loop = (tmp_path / name for name in ("a.svs", "b.svs", "c.svs", "d.svs"))
    os.mkfifo(pipe)
    link.symlink_to("moved.svs")
    slide.touch()
    loop.symlink_to(loop)
    assert problems(tmp_path) == [
        f"{pipe}: is not a regular file; remove it, or give it another ending",
        f"{link}: is a link to moved.svs, which does not exist; restore the file, or remove the link",
        "",
        f"{loop}: is a link to {loop}, which does not exist; restore the file, or remove the link",
    ]


@pytest.mark.full
def test_a_link_to_something_else_than_a_file_is_not_called_broken(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.svs").symlink_to("pipe")
    assert problems(tmp_path) == [f"{tmp_path / 'a.svs'}: is not a regular file; remove it, or give it another ending"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_slide_that_cannot_be_examined_is_left_to_the_attempt(
    tmp_path: Path, unexaminable: Callable[[Path, int], None], number: int
) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "b.svs").symlink_to("nothing")
    unexaminable(tmp_path, number)
    assert problems(tmp_path) == ["", ""]


@pytest.mark.full
def test_an_input_that_cannot_be_examined_is_an_error_with_the_reason(
    tmp_path: Path, unexaminable: Callable[[Path, int], None]
) -> None:
    unexaminable(tmp_path, errno.EACCES)
    with pytest.raises(ConfigError, match=r"slides: Permission denied; check the path$"):
        collect_jobs([tmp_path / "slides"])
