"""The batch engine on workers whose outcomes are known: what the command and the flow share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.batch import board, queue, window
from pipeline.batch.attempt import Attempt
from pipeline.batch.board import Board
from pipeline.batch.queue import run_batch
from pipeline.batch.tally import tally
from pipeline.errors import Cancelled, ClusterError, LockedError
from pipeline.files import file_lock
from pipeline.progress import no_progress
from pipeline.results.folder import lock_file
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from tests.pipeline.batch.scripted import ScriptedWorkers, StaleError, touched
from tests.pipeline.summaries import rows_of
from wsi.errors import ResolutionError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(window, "LOOK_S", 0.02)


def jobs_of(folder: Path, names: str) -> list[SlideJob]:
    touched(folder / "in", *names)
    return [SlideJob(folder / "in" / f"{name}.svs") for name in names]


def run(tmp_path: Path, workers: ScriptedWorkers, names: str = "abc", **options: object) -> list[SlideResult]:
    jobs = jobs_of(tmp_path, names)
    return run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1, 3])
def test_only_transient_failures_are_retried(tmp_path: Path, at_once: int) -> None:
    script: dict[str, list[Exception]] = {
        "a": [StaleError(), StaleError()],
        "b": [StaleError() for _ in range(9)],
        "c": [ResolutionError("no mpp")],
    }
    workers = ScriptedWorkers(script, slides_at_once=at_once)
    results = run(tmp_path, workers, "abcd")
    assert [one.status for one in results] == ["done", "failed", "failed", "done"]
    assert [workers.tried.count(name) for name in "abcd"] == [3, 4, 1, 1]
    assert results[1].error.startswith("b.svs: StaleError: [Errno 116] Stale file handle")
    assert rows_of(tmp_path / "out")["c"]["error"] == "no mpp"


def test_a_slide_that_another_run_has_locked_is_attempted_after_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers = ScriptedWorkers({"a": [LockedError("a is locked"), LockedError("a is locked")]}, slides_at_once=1)
    assert tally(run(tmp_path, workers)) == "3 slides: 3 done"
    assert workers.tried == ["a", "b", "c", "a", "a"]
    assert caplog.text.count(" a: another run is working on this slide; waiting for it") == 1


def test_locked_slides_whose_files_have_the_same_name_are_named_by_their_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = []
    for case in ("case1", "case2"):
        touched(tmp_path / case, "slide")
        jobs.append(SlideJob(tmp_path / case / "slide.svs", name=f"{case}/slide"))
    workers = ScriptedWorkers({"slide": [LockedError("locked"), LockedError("locked")]}, slides_at_once=1)
    run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    waiting = "another run is working on this slide; waiting for it"
    assert [one for one in caplog.messages if waiting in one] == [f"case1/slide: {waiting}", f"case2/slide: {waiting}"]


def test_a_slide_is_taken_over_when_the_run_that_locked_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = FileLock(lock_file(tmp_path / "out", "a"), thread_local=False)
    held.acquire()
    workers = ScriptedWorkers({"a": [LockedError("a is locked")]})
    threading.Timer(0.3, held.release).start()
    assert tally(run(tmp_path, workers)) == "3 slides: 3 done"
    assert workers.tried[-1] == "a"
    assert workers.tried.count("a") == 2


def test_a_lock_that_cannot_be_examined_does_not_stop_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> bool:
        raise StaleError

    monkeypatch.setattr(queue, "is_locked", stale)
    workers = ScriptedWorkers({"a": [LockedError("a is locked")]})
    assert tally(run(tmp_path, workers)) == "3 slides: 3 done"
    assert workers.tried.count("a") == 2


def test_attempts_on_the_calling_thread_are_reported_one_by_one_although_workers_join(tmp_path: Path) -> None:
    reported: list[str] = []
    seen: list[int] = []
    workers = ScriptedWorkers(slides_at_once=1)

    def join(_: str) -> None:
        workers.slides_at_once = 4
        seen.append(len(reported))

    workers.before = join
    jobs = jobs_of(tmp_path, "abcd")
    run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda one: reported.append(one.slide))
    assert seen == [0, 1, 2, 3]


def test_rows_that_cannot_be_written_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    table = Board(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(board, "write_summary", full)
        table.add(SlideResult("a", "done", 1.0))
    table.add(SlideResult("b", "done", 1.0))
    table.write()
    assert set(rows_of(tmp_path)) == {"a", "b"}


@pytest.mark.full
def test_a_stopped_process_that_writes_the_table_delays_the_batch_by_seconds_and_the_rows_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(board, "LAST_WAIT_S", 0.2)
    table = Board(tmp_path)
    with file_lock(tmp_path / ".summary.lock"):
        table._unwritten.append(SlideResult("a", "done", 1.0))
        table.write(0.1)
        assert "summary.csv: another process has been writing it for more than 0.1 s; end that process" in caplog.text
        missing = table.close()
    assert missing.startswith(f"{tmp_path}: 1 row of this run could not be written to summary.csv; the results")
    assert "trying once more to write summary.csv, for up to 0.2 s" in caplog.text
    assert table.close() == ""
    assert set(rows_of(tmp_path)) == {"a"}


def test_rows_that_are_missing_at_the_end_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def immutable(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(board, "write_summary", immutable)
    missing: list[str] = []
    results = run(tmp_path, ScriptedWorkers(), incomplete=missing.append)
    assert [one.status for one in results] == ["done"] * 3
    assert [text.partition("; ")[0] for text in missing] == [
        f"{tmp_path / 'out'}: 3 rows of this run could not be written to summary.csv"
    ]


def test_a_slide_that_stays_locked_for_longer_than_the_timeout_fails(tmp_path: Path) -> None:
    workers = ScriptedWorkers({"a": [LockedError("a is locked") for _ in range(1000)]})
    results = run(tmp_path, workers, lock_timeout_s=0.2)
    assert (results[0].status, results[0].error) == ("failed", "a is locked")


def test_the_window_is_wider_than_64_slides_and_has_no_parts(tmp_path: Path) -> None:
    together = threading.Barrier(150)
    workers = ScriptedWorkers(slides_at_once=150, before=lambda _: together.wait(30))
    jobs = [SlideJob(tmp_path / f"s{number}.svs") for number in range(150)]
    results = run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert tally(results) == "150 slides: 150 done"
    assert workers.most == 150


def test_slides_at_once_narrows_the_window(tmp_path: Path) -> None:
    workers = ScriptedWorkers(slides_at_once=3)
    run(tmp_path, workers, "abcdef", slides_at_once=1)
    assert workers.most == 1


def test_workers_are_opened_for_the_first_slide_and_closed_at_the_end(tmp_path: Path) -> None:
    events: list[str] = []

    @contextmanager
    def opened(first: SlideJob) -> Iterator[ScriptedWorkers]:
        events.append(f"open for {first.path.stem}")
        yield ScriptedWorkers()
        events.append("close")

    jobs = jobs_of(tmp_path, "ab")
    run_batch(jobs, tmp_path / "out", opened, lambda _: no_progress, lambda one: events.append(one.slide))
    assert (events[0], sorted(events[1:3]), events[3]) == ("open for a", ["a", "b"], "close")


def test_every_attempt_runs_within_the_callers_function(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def attempt(job: SlideJob, make: object) -> Attempt:
        made = make()  # type: ignore[operator]
        seen.append((job.path.stem, made.end))
        return made  # type: ignore[no-any-return]

    workers = ScriptedWorkers({"a": [StaleError()], "b": [StaleError() for _ in range(4)]}, slides_at_once=1)
    run(tmp_path, workers, attempt=attempt)
    assert sorted(seen) == [
        ("a", "final"),
        ("a", "transient"),
        ("b", "final"),
        *[("b", "transient")] * 3,
        ("c", "final"),
    ]


def test_the_caller_can_show_progress_while_slides_run(tmp_path: Path) -> None:
    shown = threading.Event()
    workers = ScriptedWorkers(before=lambda _: shown.wait(30))
    run(tmp_path, workers, "ab", tick=shown.set)
    assert shown.is_set()


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_broken_off_run_leaves_the_table_and_the_report_of_what_was_done(tmp_path: Path, at_once: int) -> None:
    workers = ScriptedWorkers({"b": [Cancelled("stopped")]}, slides_at_once=at_once)
    workers.before = lambda name: None if name == "a" else first.wait(30)
    first = threading.Event()
    jobs = jobs_of(tmp_path, "abc")
    with pytest.raises(Cancelled, match="stopped"):
        run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: first.set())
    assert workers.cancelled
    assert rows_of(tmp_path / "out")["a"]["status"] == "done"
    assert "b" not in rows_of(tmp_path / "out")
    assert (tmp_path / "out" / "index.html").exists()


def test_workers_that_break_when_they_close_lose_no_result(tmp_path: Path) -> None:
    @contextmanager
    def lost(_: SlideJob) -> Iterator[ScriptedWorkers]:
        yield ScriptedWorkers()
        raise ClusterError("tcp://cluster: is gone")

    with pytest.raises(ClusterError):
        run_batch(jobs_of(tmp_path, "a"), tmp_path / "out", lost, lambda _: no_progress, lambda _: None)
    assert rows_of(tmp_path / "out")["a"]["status"] == "done"


def test_a_report_that_cannot_be_written_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Path) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(queue, "write_report", broken)
    assert tally(run(tmp_path, ScriptedWorkers())) == "3 slides: 3 done"
    assert "out: the report could not be written: a defect" in caplog.text


def test_rewriting_the_table_takes_at_most_five_percent_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = 0.0, list[int]()

    def write(_: Path, results: list[SlideResult], __: float) -> None:
        nonlocal now
        now += 1.0  # a large table
        written.append(len(results))

    monkeypatch.setattr(board, "write_summary", write)
    table = Board(tmp_path / "out", clock=lambda: now)
    for _ in range(1000):
        now += 0.1
        table.add(SlideResult("a", "done", 0.0))
    table.write()
    assert sum(written) == 1000
    assert len(written) / now <= board.WRITING_SHARE + 1 / now


def test_the_tally_counts_each_way_to_end() -> None:
    done, skipped = SlideResult("a", "done", 0.0), SlideResult("b", "skipped", 0.0)
    new, before = SlideResult("c", "failed", 0.0), SlideResult("d", "failed", 0.0, failed_before=True)
    assert tally([]) == "0 slides: none"
    assert tally([new]) == "1 slide: 1 failed"
    assert tally([done, skipped, new]) == "3 slides: 1 done, 1 skipped, 1 failed"
    assert tally([skipped, before, before]) == "3 slides: 1 skipped, 2 failed before, 0 new"
    assert tally([before, new]) == "2 slides: 1 failed before, 1 new"
