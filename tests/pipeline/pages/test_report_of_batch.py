"""Tests of the report that a finished or interrupted batch writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.batch.queue import run_batch
from pipeline.errors import Cancelled
from pipeline.progress import Progress, no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from tests.pipeline.pages.results import names, opened, result_of, row, write_result

if TYPE_CHECKING:  # most test runs need no browser
    from playwright.sync_api import Page


class FakeWorkers:
    """Workers that return existing results. The slide "stop" is interrupted; slides without a result fail."""

    slides_at_once = 1

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        if job.path.stem == "stop":
            raise Cancelled("interrupted")
        return result_of(output / job.path.stem)

    def cancel(self) -> None:
        pass


def batch(output: Path, *stems: str) -> list[SlideResult]:
    jobs = [SlideJob(Path(f"{stem}.svs")) for stem in stems]
    return run_batch(jobs, output, FakeWorkers(), lambda _: no_progress, lambda _: None)


def test_a_batch_writes_a_report_of_all_slides(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path, "one")
    batch(tmp_path, "one", "lost")
    opened(page, tmp_path / "index.html")
    assert names(page) == ["lost", "one"]
    assert row(page, "lost").startswith("lost ✕ failed – 0 s Error: lost.svs: FileNotFoundError")


def test_an_interrupted_batch_writes_a_report_of_the_finished_slides(page: Page, tmp_path: Path) -> None:
    write_result(tmp_path, "one")
    with pytest.raises(Cancelled):
        batch(tmp_path, "one", "stop", "two")
    opened(page, tmp_path / "index.html")
    assert names(page) == ["one"]


def test_a_batch_interrupted_before_its_first_result_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        batch(tmp_path / "out", "stop")
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_logged_and_does_not_stop_the_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_result(tmp_path, "one")
    (tmp_path / "index.html").mkdir()
    assert [result.status for result in batch(tmp_path, "one")] == ["done"]
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "index.html: cannot be written" in record.message
