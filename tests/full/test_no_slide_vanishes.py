"""Attacks on the promise: every slide that a batch is given ends as a row, and what could not be searched is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.collect import collect_jobs
from pipeline.batch.names import named_jobs
from pipeline.batch.queue import run_batch
from pipeline.errors import ConfigError
from pipeline.progress import no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.dicom import write_instance
from tests.pipeline.fakes import SMALL, color_predictor
from tests.pipeline.summaries import rows_of
from tests.slides import small_slide


def run(jobs: list[SlideJob], output: Path) -> list[SlideResult]:
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    return run_batch(jobs, output, workers, lambda _: no_progress, lambda _: None)


def test_a_link_that_leads_nowhere_is_a_failed_row_with_its_name(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    (slides / "sub").mkdir(parents=True)
    small_slide(slides / "good.svs")
    (slides / "lost.svs").symlink_to(tmp_path / "unmounted" / "lost.svs")
    (slides / "sub" / "also.svs").symlink_to(tmp_path / "unmounted" / "lost.svs")
    (slides / "loop.svs").symlink_to(slides / "loop.svs")
    os.mkfifo(slides / "pipe.svs")
    results = {r.slide: r for r in run(collect_jobs([slides], recursive=True), tmp_path / "out")}
    assert {name: r.status for name, r in results.items()} == {
        "good": "done", "lost": "failed", "also": "failed", "loop": "failed", "pipe": "failed"
    }  # fmt: skip
    assert "is a link to" in results["lost"].error
    assert "is not a regular file" in results["pipe"].error
    assert {name: row["status"] for name, row in rows_of(tmp_path / "out").items()} == {
        name: r.status for name, r in results.items()
    }


def test_a_folder_that_cannot_be_searched_is_a_failed_row_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    (slides / "locked").mkdir(parents=True)
    small_slide(slides / "good.svs")
    small_slide(slides / "locked" / "hidden.svs")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:  # root may read every folder
        patch.setattr(os, "scandir", refuse)
        jobs = collect_jobs([slides], recursive=True)
        with pytest.raises(ConfigError, match=r"locked: cannot be searched: Permission denied"):
            collect_jobs([slides / "locked"])
    results = run(jobs, tmp_path / "out")
    assert [(r.slide, r.status) for r in results] == [("good", "done"), ("locked/", "failed")]
    assert "locked: cannot be searched for slides: Permission denied" in results[1].error
    assert rows_of(tmp_path / "out")["locked/"]["status"] == "failed"
    results = run(collect_jobs([slides], recursive=True), tmp_path / "out")
    assert [(r.slide, r.status) for r in results] == [("good", "skipped"), ("hidden", "done")]
    assert set(rows_of(tmp_path / "out")) == {"good", "hidden"}


def test_linked_folders_are_searched_once_and_loops_end(tmp_path: Path) -> None:
    slides, elsewhere = tmp_path / "slides", tmp_path / "elsewhere"
    slides.mkdir()
    elsewhere.mkdir()
    (slides / "a.svs").touch()
    (elsewhere / "b.svs").touch()
    (slides / "link").symlink_to(elsewhere)
    (slides / "again").symlink_to(elsewhere)
    (slides / "self").symlink_to(slides)
    (elsewhere / "back").symlink_to(slides)
    jobs = collect_jobs([slides], recursive=True)
    assert [job.path.relative_to(slides).as_posix() for job in jobs] == ["a.svs", "again/b.svs"]


def test_a_dicom_series_is_one_slide_named_after_its_folder(tmp_path: Path) -> None:
    for case, series in (("case1", "1.1"), ("case2", "1.2")):
        (tmp_path / case).mkdir()
        for number, columns in enumerate((4096, 1024, 256)):
            write_instance(tmp_path / case / f"1.2.840.{number}.dcm", series, columns=columns)
        write_instance(tmp_path / case / "label.dcm", series, columns=9999, kind="LABEL")
    jobs = collect_jobs([tmp_path], recursive=True)
    assert [(job.path.relative_to(tmp_path).as_posix(), job.result_name) for job in jobs] == [
        ("case1/1.2.840.0.dcm", "case1"), ("case2/1.2.840.0.dcm", "case2")
    ]  # fmt: skip
    assert collect_jobs([tmp_path / "case1"]) == jobs[:1]
    assert collect_jobs(sorted((tmp_path / "case1").iterdir())) == jobs[:1]
    (tmp_path / "list.csv").write_text("slide,mpp,id\ncase1/label.dcm,0.5,first\n")
    (listed,) = collect_jobs([tmp_path / "list.csv"])
    assert (listed.path, listed.mpp, listed.result_name) == (jobs[0].path, 0.5, "first")


def test_several_series_of_a_folder_are_several_slides(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    for series in "12":
        for level in "ab":
            write_instance(folder / f"{series}{level}", f"1.{series}", number=series)
    write_instance(folder / "3.dcm", "1.3")
    (folder / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert [job.result_name for job in collect_jobs([folder])] == ["case series 1", "case series 2", "3", "damaged"]


def test_series_of_a_folder_with_the_same_number_and_files_named_after_uids_have_names_of_their_own(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    for number in range(4):
        write_instance(folder / f"1.2.840.{number}", f"1.{number // 2}", columns=1024 >> number % 2)
    write_instance(folder / "1.2.840.8", "1.8")
    write_instance(folder / "1.2.840.9", "1.9")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    jobs = collect_jobs([folder])
    assert sorted(job.result_name for job in named_jobs(jobs, tmp_path / "out")) == [
        "1.2.840.8", "1.2.840.9", "case series 1.2.840.0", "case series 1.2.840.2"
    ]  # fmt: skip
    assert collect_jobs([job.path for job in jobs]) == jobs


def test_a_folder_of_dicom_files_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_instance(tmp_path / f"{number}.dcm", f"1.{number // 3}") for number in range(300)]
    listed: list[Path] = []
    iterdir = Path.iterdir

    def counted(path: Path) -> Iterator[Path]:
        listed.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", counted)
    assert len(collect_jobs(paths)) == 100
    assert listed == [tmp_path]


@pytest.mark.shared
def test_a_real_dicom_series_gives_one_result(tmp_path: Path, shared_slides: Path) -> None:
    case = tmp_path / "case-7"
    case.mkdir()
    shutil.copy(shared_slides / "camelyon-multiframe.dcm", case / "1.2.3.dcm")
    label = (case / "1.2.3.dcm").read_bytes().replace(b"\\VOLUME\\RESAMPLED", b"\\LABEL\\RESAMPLED ")
    (case / "0.label.dcm").write_bytes(label)
    (job,) = collect_jobs([case])
    (result,) = run([replace(job, mpp=1.0)], tmp_path / "out")
    assert (result.slide, result.status, result.error) == ("case-7", "done", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case-7", "index.html", "summary.csv"]
