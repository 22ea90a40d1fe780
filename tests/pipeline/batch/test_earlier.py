"""Finished results and remembered failures: what a batch does not attempt again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.errors import DeviceUnavailableError, UnknownBundleError
from pipeline.batch.attempt import failure, is_lasting
from pipeline.batch.earlier import EarlierRuns
from pipeline.batch.queue import run_batch
from pipeline.batch.tally import new_failures, tally
from pipeline.config import SegmentConfig
from pipeline.errors import (
    Cancelled,
    ClusterError,
    LockedError,
    OutputError,
    PlanError,
    SlideTimeoutError,
    WorkerCrashedError,
)
from pipeline.progress import no_progress
from pipeline.results.record import run_identity, write_run
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob, Workers
from tests.pipeline.batch.scripted import ScriptedWorkers, StaleError, touched
from tests.pipeline.runs import make_run
from tests.pipeline.summaries import rows_of
from wsi.errors import ResolutionError, SlideFormatError, SlideNotFoundError, SlideReadError
from wsi.slide import slide_stamp

CONFIG = SegmentConfig(device="cpu", runtime="torch")


@dataclass
class Night:
    """A folder of slides that is segmented every night."""

    folder: Path

    def __post_init__(self) -> None:
        self.workers = ScriptedWorkers()
        self.jobs = [SlideJob(self.folder / "in" / f"{name}.svs") for name in "abc"]
        touched(self.folder / "in", *"abc")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, config: SegmentConfig = CONFIG, model: str = DEFAULT_BUNDLE, **options: Any) -> list[SlideResult]:
        """Run the batch once; `workers.tried` then contains the attempts of this run."""
        self.workers.tried.clear()
        earlier = EarlierRuns(self.out, model, config, **options)
        return run_batch(self.jobs, self.out, self.workers, lambda _: no_progress, lambda _: None, earlier=earlier)

    def fail(self, *names: str, error: Callable[[], Exception] = lambda: ResolutionError("no mpp")) -> None:
        """Let the next attempts at these slides fail."""
        self.workers.script = {name: [error()] for name in names}

    def remembered(self) -> set[str]:
        return {path.name for path in self.out.glob(".*.failed.json")}


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_a_slide_that_failed_for_good_is_reported_and_not_tried_by_the_next_run(night: Night) -> None:
    night.fail("b")
    first = night.run()
    assert (tally(first), new_failures(first)) == ("3 slides: 2 done, 1 failed", 1)
    second = night.run()
    assert sorted(night.workers.tried) == ["a", "c"]
    assert (tally(second), new_failures(second)) == ("3 slides: 2 done, 1 failed before, 0 new", 0)
    assert (second[1].status, second[1].failed_before, second[1].error) == ("failed", True, "no mpp")
    row = rows_of(night.out)["b"]
    assert (row["status"], row["error"]) == ("failed", "no mpp")
    assert "no mpp" in (night.out / "index.html").read_text(encoding="utf-8")


def test_the_file_of_a_remembered_failure_contains_what_the_failure_depends_on(night: Night) -> None:
    night.fail("b")
    night.run()
    facts = json.loads((night.out / ".b.failed.json").read_text(encoding="utf-8"))
    assert facts["stamp"] == slide_stamp(night.jobs[1].path)
    assert facts["model"] == load_bundle(DEFAULT_BUNDLE).digest
    assert facts["parameters"]["canvas_m"] == CONFIG.canvas_m
    assert facts["error"] == "no mpp"
    assert set(facts) == {"slide", "stamp", "model", "parameters", "wsi-segment", "readers", "error"}


def test_retry_failed_and_force_try_again_and_a_success_forgets_the_failure(night: Night) -> None:
    night.fail("a", "b")
    night.run()
    assert night.remembered() == {".a.failed.json", ".b.failed.json"}
    night.fail("b")
    assert [one.status for one in night.run(retry_failed=True)] == ["done", "failed", "done"]
    assert night.remembered() == {".b.failed.json"}
    night.run(replace(CONFIG, force=True))
    assert night.remembered() == set()


def test_a_changed_slide_is_tried_again(night: Night) -> None:
    night.fail("b")
    night.run()
    os.utime(night.jobs[1].path, ns=(1, 1))
    assert night.run()[1].status == "done"


def test_a_changed_setting_or_mpp_or_model_is_tried_again(night: Night) -> None:
    night.fail("b")
    night.run()
    night.fail("b")
    assert night.run(replace(CONFIG, canvas_m=512))[1].failed_before is False
    night.jobs[1] = replace(night.jobs[1], mpp=0.5)
    assert night.run(replace(CONFIG, canvas_m=512))[1].status == "done"


def test_a_changed_model_is_tried_again(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.fail("b")
    night.run()
    bundle = load_bundle(DEFAULT_BUNDLE)
    monkeypatch.setattr("pipeline.batch.earlier.load_bundle", lambda *_: replace(bundle, digest="another"))
    assert night.run()[1].status == "done"


def test_a_changed_version_is_tried_again(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.fail("b")
    night.run()
    monkeypatch.setattr("pipeline.batch.earlier.version", lambda _: "99.0")
    assert night.run()[1].status == "done"


def test_a_larger_allowed_share_of_unreadable_tiles_is_tried_again(night: Night) -> None:
    night.fail("b", error=lambda: SlideReadError("b.svs: at least 3 of 20 tiles cannot be read (at most 1%)"))
    night.run()
    assert night.run(replace(CONFIG, max_bad_share=0.5))[1].status == "done"


def test_a_slide_or_result_that_cannot_be_examined_does_not_stop_the_batch(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(night.out, night.jobs[1])

    def stale(path: Path) -> str:
        if path.stem == "b":
            raise StaleError
        return slide_stamp(path)

    monkeypatch.setattr("pipeline.batch.earlier.slide_stamp", stale)
    assert [one.status for one in night.run()] == ["done", "done", "done"]
    assert sorted(night.workers.tried) == ["a", "b", "c"]


def test_the_failure_of_a_slide_that_is_gone_or_changed_after_the_attempt_is_not_remembered(night: Night) -> None:
    paths = {job.path.stem: job.path for job in night.jobs}
    night.workers.before = lambda name: paths[name].unlink() if name == "a" else os.utime(paths[name], ns=(1, 1))
    night.fail("a", "b", error=lambda: SlideReadError("its pixels cannot be decoded"))
    assert [one.status for one in night.run()] == ["failed", "failed", "done"]
    assert night.remembered() == set()


def test_settings_that_do_not_change_a_result_do_not_try_again(night: Night) -> None:
    night.fail("b")
    night.run()
    assert night.run(replace(CONFIG, num_workers=1, batch_size=3))[1].failed_before


@pytest.mark.parametrize(
    "error",
    [
        SlideFormatError("not a slide"),
        SlideReadError("cannot be decoded"),
        ResolutionError("no mpp"),
        WorkerCrashedError("crashed"),
        ValueError("a defect that this slide triggers"),
    ],
)
def test_a_failure_that_the_slide_causes_is_lasting(error: Exception) -> None:
    assert is_lasting(error)


@pytest.mark.parametrize(
    "error",
    [
        StaleError(),
        SlideNotFoundError("not mounted?"),
        PermissionError(13, "Permission denied"),
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("can't start new thread"),
        Exception("alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 8 bytes"),
        OSError(24, "Too many open files"),
        OutputError("the disk is full"),
        PlanError("too little memory"),
        LockedError("held"),
        ClusterError("gone"),
        SlideTimeoutError("too slow"),
        DeviceUnavailableError("no GPU"),
    ],
)
def test_a_failure_that_somebody_can_repair_without_the_slide_is_not_lasting(error: Exception) -> None:
    assert not is_lasting(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError("no 3 GiB"), "out of memory (no 3 GiB); lower --batch-size or --num-workers"),
        (
            Exception("Insufficient memory\n"),
            "out of memory (Insufficient memory); lower --batch-size or --num-workers",
        ),
        (
            RuntimeError("can't start new thread"),
            "out of threads (can't start new thread); raise the limit of threads and processes (ulimit -u, or that of "
            "the container), or lower --num-workers",
        ),
        (
            OSError(24, "Too many open files"),
            "out of file handles ([Errno 24] Too many open files); raise the limit of open files (ulimit -n), or lower "
            "--num-workers",
        ),
    ],
    ids=["memory", "memory of a library", "threads", "file handles"],
)
def test_a_failure_for_lack_of_memory_threads_or_file_handles_states_what_is_lacking(
    error: Exception, text: str
) -> None:
    assert failure(SlideJob(Path("a.svs")), error) == f"a.svs: {text}"


def test_a_slide_error_from_a_closed_or_stale_file_is_not_lasting() -> None:
    for cause in (PermissionError(13, "Permission denied"), StaleError()):
        error = SlideReadError("a.svs: cannot be read")
        error.__cause__ = cause
        assert not is_lasting(error)


def test_transient_failures_are_not_remembered(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.batch.window.RETRY_DELAYS_S", (0.0,))
    night.workers.script = {"b": [StaleError(), StaleError()]}
    assert [one.status for one in night.run()] == ["done", "failed", "done"]
    assert night.remembered() == set()
    assert night.run()[1].status == "done"


def test_a_cancelled_run_remembers_nothing(night: Night) -> None:
    night.fail("b", error=lambda: Cancelled("stopped"))
    with pytest.raises(Cancelled):
        night.run()
    assert night.remembered() == set()


def test_a_damaged_record_of_a_failure_is_ignored(night: Night) -> None:
    night.fail("b")
    night.run()
    for content in ("", "[1]", "{}", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (night.out / ".b.failed.json").write_text(content, encoding="utf-8")
        night.fail("b")
        assert night.run()[1].failed_before is False


def test_a_folder_that_cannot_be_written_does_not_stop_the_batch(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.batch.earlier.write_atomically", full)
    night.fail("b")
    assert [one.status for one in night.run()] == ["done", "failed", "done"]
    assert "b.svs: cannot update" in caplog.text


def finish(output: Path, job: SlideJob, config: SegmentConfig = CONFIG, model: str = DEFAULT_BUNDLE) -> None:
    """Write what a finished run leaves of this slide, as far as the batch examines it."""
    folder = output / job.path.stem
    folder.mkdir(parents=True)
    run = make_run(job.path.stem, outputs=("run.json",))
    identity = run_identity("digest", load_bundle(model).digest, config.parameters("torch"))
    slide = run.slide.model_copy(update={"stamp": slide_stamp(job.path)})
    write_run(folder, run.model_copy(update={"identity": identity, "slide": slide}))


def test_a_finished_slide_is_skipped_without_reading_it_and_without_workers(night: Night) -> None:
    for job in night.jobs:
        finish(night.out, job)

    def unopened(_: SlideJob) -> Workers:
        raise AssertionError("no slide needs workers")

    earlier = EarlierRuns(night.out, DEFAULT_BUNDLE, CONFIG)
    results = run_batch(
        night.jobs,
        night.out,
        unopened,  # type: ignore[arg-type] # never returns
        lambda _: no_progress,
        lambda _: None,
        earlier=earlier,
    )
    assert [(one.status, one.areas_mm2["tumor"], one.tissue_mm2) for one in results] == [("skipped", 0.25, 1.5)] * 3
    assert tally(results) == "3 slides: 3 skipped"


def test_a_result_of_another_slide_setting_or_missing_file_is_attempted(night: Night) -> None:
    for job in night.jobs:
        finish(night.out, job)
    os.utime(night.jobs[0].path, ns=(1, 1))
    night.run()
    assert night.workers.tried == ["a"]
    night.run(replace(CONFIG, canvas_m=512))
    assert sorted(night.workers.tried) == ["a", "b", "c"]
    night.run(replace(CONFIG, force=True))
    assert sorted(night.workers.tried) == ["a", "b", "c"]


def test_any_runtime_keeps_a_result_and_a_named_runtime_only_its_own(night: Night) -> None:
    for job in night.jobs:
        finish(night.out, job)
    night.run(replace(CONFIG, runtime="auto"))
    assert night.workers.tried == []
    night.run(replace(CONFIG, runtime="openvino"))
    assert sorted(night.workers.tried) == ["a", "b", "c"]


def test_a_model_that_cannot_be_loaded_is_refused_before_any_slide(tmp_path: Path) -> None:
    with pytest.raises(UnknownBundleError):
        EarlierRuns(tmp_path, "no-model", CONFIG)


def test_a_slide_with_a_model_of_its_own_that_is_missing_is_attempted(night: Night) -> None:
    finish(night.out, night.jobs[0])
    night.jobs[0] = replace(night.jobs[0], model="no/such")
    night.fail("a")
    assert night.run()[0].status == "failed"
    assert night.remembered() == set()
