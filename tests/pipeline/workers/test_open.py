from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from models.card import ModelCard
from models.errors import UnknownBundleError
from pipeline.batch.collect import collect_jobs
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import (
    Cancelled,
    ClusterError,
    ConfigError,
    LockedError,
    OutputError,
    PlanError,
    SlideTimeoutError,
    WorkerLostError,
    is_transient,
)
from pipeline.progress import Progress, no_progress
from pipeline.results.folder import is_locked, lock_file
from pipeline.results.slide_result import SlideResult
from pipeline.slide.plan import PlannedSlide, plan_slide
from pipeline.workers import open as opening
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess, load_predictor
from pipeline.workers.open import check_workers, open_workers
from tests.pipeline.fakes import SMALL, color_predictor, constant_predictor, region_slide
from tests.pipeline.small_bundle import small_bundle, speckled_slide
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from tests.slides import PINK, painted, write_slide
from wsi.errors import ResolutionError, SlideNotFoundError, SlideReadError


def small(folder: Path, *names: str) -> list[SlideJob]:
    return [SlideJob(region_slide(folder / f"{name}.svs")) for name in names]


@dataclass
class Meeting:
    """Workers whose calls wait until `slides_at_once` of them run. `ran` lists the slides in start order."""

    slides_at_once: int
    cancelled: bool = False
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.slides_at_once)

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        self.ran.append(job.path.stem)
        self._barrier.wait(timeout=20)
        if job.path.stem == "broken":
            raise OutputError("broken.svs: is broken")
        return SlideResult(job.path.stem, "done", 1.0)

    def cancel(self) -> None:
        self.cancelled = True
        self._barrier.abort()


def test_slides_at_once_slides_run_together_and_results_keep_the_order(tmp_path: Path) -> None:
    jobs = [SlideJob(tmp_path / f"{name}.svs") for name in ("e", "broken", "d", "c", "b", "a")]
    reported: list[str] = []
    workers = Meeting(3)
    results = run_batch(
        jobs, tmp_path / "out", workers, lambda _: no_progress, lambda result: reported.append(result.slide)
    )
    assert [r.slide for r in results] == ["e", "broken", "d", "c", "b", "a"]
    assert [r.status for r in results] == ["done", "failed", "done", "done", "done", "done"]
    assert sorted(reported) == sorted(job.path.stem for job in jobs)
    assert set(workers.ran[:3]) == {"e", "broken", "d"}
    assert set(rows_of(tmp_path / "out")) == set(reported)
    assert not workers.cancelled


def test_an_interrupt_stops_all_slides_that_run_at_once(tmp_path: Path) -> None:
    workers = Meeting(2)
    jobs = [SlideJob(tmp_path / f"{name}.svs") for name in "abcd"]

    def interrupt(_: SlideResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Cancelled, match=r"^interrupted; run the same command again to resume"):
        run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, interrupt)
    assert workers.cancelled


@pytest.mark.full
def test_a_model_is_loaded_once_and_a_manifest_can_name_another_for_a_slide(tmp_path: Path) -> None:
    small(tmp_path, "a", "b", "c")
    small_bundle(tmp_path / "other" / "model")
    (tmp_path / "list.csv").write_text("slide,model\na.svs,\nb.svs,other/model\nc.svs,colon-gland\n", encoding="utf-8")
    jobs = collect_jobs([tmp_path / "list.csv"])
    assert [job.model for job in jobs] == [None, str(tmp_path / "other/model"), "colon-gland"]
    loaded: list[str] = []
    models = {"usual": color_predictor(), str(tmp_path / "other/model"): constant_predictor([0.0, 9.0])}
    models["colon-gland"] = models["usual"]

    def load(name: str) -> object:
        loaded.append(name)
        return models[name]

    workers = InProcess(load, "usual", SMALL)  # type: ignore[arg-type] # predictors of fakes
    for _ in range(2):
        results = run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert [r.status for r in results] == ["skipped"] * 3
    assert loaded == ["usual", str(tmp_path / "other/model"), "colon-gland"]
    assert results[0].areas_mm2["class-1"] == pytest.approx(320 * 256 / 1e6)
    assert results[1].areas_mm2["class-0"] == 0
    assert results[1].areas_mm2["class-1"] > 0.5


@pytest.mark.full
def test_the_first_slide_is_planned_while_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, config = str(small_bundle(tmp_path / "small").path), replace(SMALL, device="cpu", runtime="torch")
    pixels_HWC = painted((300, 250), ((20, 20, 250, 200), PINK))
    job, other = (SlideJob(write_slide(tmp_path / f"{name}.svs", pixels_HWC, mpp=1.0)) for name in "ab")
    missing = SlideJob(tmp_path / "missing.svs")
    planned: list[Path] = []

    def plan(path: Path, card: ModelCard, settings: SegmentConfig) -> PlannedSlide:
        planned.append(path)
        return plan_slide(path, card, settings)

    monkeypatch.setattr("pipeline.workers.in_process.plan_slide", plan)
    with open_workers(None, bundle, config, first=job) as workers:
        results = [workers.segment(one, tmp_path / "ahead", no_progress) for one in (job, other)]
    with open_workers(None, bundle, config) as workers:
        results += [workers.segment(one, tmp_path / "usual", no_progress) for one in (job, other)]
    assert planned == [job.path]
    assert [result.status for result in results] == ["done"] * 4
    for name in ("a", "b"):
        ahead, usual = (tmp_path / folder / name / f"{name}.geojson" for folder in ("ahead", "usual"))
        assert ahead.read_bytes() == usual.read_bytes()
    with open_workers(None, bundle, config, first=missing) as workers:
        with pytest.raises(SlideNotFoundError):
            workers.segment(missing, tmp_path / "ahead", no_progress)
        assert workers.segment(job, tmp_path / "ahead", no_progress).status == "skipped"
    with pytest.raises(UnknownBundleError), open_workers(None, "no/such", config, first=job):
        pass


def test_a_slide_that_changes_after_it_was_planned_fails(tmp_path: Path) -> None:
    bundle, config = str(small_bundle(tmp_path / "small").path), replace(SMALL, device="cpu", runtime="torch")
    (job,) = small(tmp_path, "a")
    with open_workers(None, bundle, config, first=job) as workers:
        workers._planned[job].result()  # type: ignore[attr-defined]
        os.utime(job.path, ns=(1, 1))
        with pytest.raises(SlideReadError, match=r"a\.svs: the file has changed since the run began"):
            workers.segment(job, tmp_path / "out", no_progress)
    assert not (tmp_path / "out" / "a").exists()


def test_a_slide_with_a_missing_model_fails_alone(tmp_path: Path) -> None:
    (job,) = small(tmp_path, "a")
    with open_workers(None, "colon-gland", SMALL) as workers:
        (result,) = run_batch(
            [SlideJob(job.path, model="no/such")], tmp_path / "out", workers, lambda _: no_progress, lambda _: None
        )
    assert result.status == "failed"
    assert result.error.startswith("no/such: neither a shipped model")


@pytest.mark.full
def test_cancelled_workers_stop_the_running_slide(tmp_path: Path) -> None:
    (job,) = small(tmp_path, "a")
    workers = InProcess(lambda _: color_predictor(), "any", SMALL)

    def cancel(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("segmenting", 3):
            workers.cancel()

    with pytest.raises(Cancelled, match=r"a\.svs: cancelled; run the same command again"):
        workers.segment(job, tmp_path / "out", cancel)
    again = InProcess(lambda _: color_predictor(), "any", SMALL).segment(job, tmp_path / "out", no_progress)
    assert (again.status, again.resumed_blocks >= 3) == ("done", True)


@pytest.mark.full
def test_a_slide_locked_by_another_process_comes_last_and_is_skipped_when_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.batch.window.LOOK_S", 0.05)
    a, b = small(tmp_path, "a", "b")
    working, both = threading.Event(), threading.Event()

    def hold(stage: str, done: int, total: int) -> None:
        working.set()
        if stage == "publishing":
            assert both.wait(60)

    other = threading.Thread(
        target=lambda: InProcess(lambda _: color_predictor(), "any", SMALL).segment(a, tmp_path / "out", hold)
    )
    other.start()
    assert working.wait(60)
    reported: list[str] = []

    def report(result: SlideResult) -> None:
        reported.append(result.slide)
        both.set()

    workers = InProcess(lambda _: color_predictor(), "any", SMALL)
    results = run_batch([a, b], tmp_path / "out", workers, lambda _: no_progress, report)
    other.join()
    assert [r.status for r in results] == ["skipped", "done"]
    assert reported == ["b", "a"]
    assert "a: another run is working on this slide; waiting for it" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".html") == ["a", "b", "summary.csv"]


@pytest.mark.full
def test_two_commands_over_the_same_folder_share_the_slides(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle").path
    (tmp_path / "slides").mkdir()
    for name in "abc":
        speckled_slide(tmp_path / "slides" / f"{name}.svs")
    command = [
        sys.executable,
        "-m",
        "pipeline.cli.segment",
        "slides",
        "-o",
        "out",
        "-m",
        str(bundle),
        "--device",
        "cpu",
    ]
    both = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    # Both commands report every slide, and every slide was segmented once.
    assert all(stdout.splitlines() == ["out/a", "out/b", "out/c"] for stdout, _ in said)
    ends = [line.split(":")[0].split() for _, stderr in said for line in stderr.splitlines() if "mm²" in line]
    assert sorted(name for status, name in ends if status == "done") == ["a", "b", "c"]
    assert sorted(name for status, name in ends if status == "skipped") == ["a", "b", "c"]
    assert {name: row["status"] for name, row in rows_of(tmp_path / "out").items()} == dict.fromkeys("abc", "done")
    alone = InProcess(lambda name: load_predictor(name, SegmentConfig(device="cpu")), str(bundle), SegmentConfig())
    jobs = [SlideJob(tmp_path / "slides" / f"{name}.svs") for name in "abc"]
    again = run_batch(jobs, tmp_path / "out", alone, lambda _: no_progress, lambda _: None)
    assert [result.status for result in again] == ["skipped"] * 3


HOLDS_LOCK = """
import sys, time
from pathlib import Path
from pipeline.files import file_lock

with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_ends_and_its_file_does_not_lock(tmp_path: Path) -> None:
    file = lock_file(tmp_path, "a")
    command = [sys.executable, "-c", HOLDS_LOCK, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            assert is_locked(tmp_path, "a")
        finally:
            process.kill()
    assert file.exists()
    assert not is_locked(tmp_path, "a")
    assert not file.exists()
    assert not is_locked(tmp_path, "b")


def test_a_timeout_and_blocks_need_other_processes() -> None:
    with (
        pytest.raises(ConfigError, match="add --scheduler local"),
        open_workers(None, "colon-gland", SMALL, slide_timeout_s=60),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="--spread blocks needs several processes"),
        open_workers(None, "colon-gland", SMALL, spread="blocks"),
    ):
        pass
    for seconds in (0.0, -1.0, float("nan")):
        with (
            pytest.raises(ConfigError, match="--slide-timeout is"),
            open_workers("local", "colon-gland", SMALL, slide_timeout_s=seconds),
        ):
            pass


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        *((f"local:{n}", rf"'local:{n}'; N of local:N must be from 1 to 20 on this machine$")
          for n in ("0", "-1", "", "21", "1_0", "many", "9" * 20)),
        ("local:" + "9" * 5000, "N of local:N must be from 1 to 20"),
        ("", r"--scheduler is ''; it must be process, local, local:N, the address of a dask.distributed cluster"),
        ("locals", "--scheduler is 'locals'; it must be"),
        ("no/such/file.json", "'no/such/file.json'; it must be .* or its scheduler file"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_an_invalid_scheduler_is_refused_before_the_model_is_loaded(
    scheduler: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "available_cores", lambda: 5)
    with pytest.raises(ConfigError, match=message), open_workers(scheduler, "no/such", SMALL):
        pass


@pytest.mark.parametrize(("cores", "most"), [(1, 16), (5, 20)])
def test_usable_workers_pass_the_check(cores: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "available_cores", lambda: cores)
    file = tmp_path / "scheduler.json"
    file.touch()
    for scheduler in ("local", "local:1", f"local:{most}", "tcp://10.0.0.1:8786", str(file)):
        check_workers(scheduler, spread="blocks", slide_timeout_s=0.1)
    check_workers("process", slide_timeout_s=math.inf)
    check_workers(None)


def test_a_missing_model_is_an_error_before_any_slide() -> None:
    for scheduler in (None, "local"):
        with pytest.raises(UnknownBundleError), open_workers(scheduler, "no/such", SMALL):
            pass


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (TimeoutError("timed out"), True),
        (ConnectionResetError(), True),
        (raised_from(OutputError("a.svs: cannot write x"), OSError(errno.ESTALE, "Stale file handle")), True),
        (raised_from(SlideReadError("a.svs: cannot be read"), OSError(errno.ETIMEDOUT, "timed out")), True),
        (WorkerLostError("gone"), True),
        (SlideTimeoutError("too long"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (raised_from(OutputError("a.svs: the disk is full"), OSError(errno.ENOSPC, "No space left")), False),
        (SlideNotFoundError("a.svs: no such file"), False),
        (raised_from(SlideReadError("a.svs: cannot be read"), FileNotFoundError(errno.ENOENT, "")), False),
        (ResolutionError("a.svs: does not contain micrometers per pixel; pass --mpp"), False),
        (PlanError("too large"), False),
        (ConfigError("wrong"), False),
        (ClusterError("other versions"), False),
        (LockedError("locked"), False),
        (Cancelled("interrupted"), False),
        (ValueError("a bug"), False),
        (None, False),
    ],
)
def test_only_errors_that_can_pass_are_transient(error: Exception | None, transient: bool) -> None:
    assert is_transient(error) == transient
