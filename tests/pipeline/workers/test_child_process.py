"""Slides in a child process: the same bytes as in this process, and what happens to the batch if it dies."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from models.errors import UnknownBundleError
from pipeline.batch.attempt import is_lasting
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled, ClusterError, ConfigError, SlideTimeoutError, WorkerLostError, is_transient
from pipeline.progress import no_progress
from pipeline.slide.recipe import segment_slide
from pipeline.workers import child_process
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import load_predictor
from pipeline.workers.open import open_workers
from pipeline.workers.semaphores import start_silent_tracker
from tests.cases import full
from tests.pipeline.fakes import data_of
from tests.pipeline.small_bundle import small_bundle, speckled_slide
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from tests.slides import PINK, painted, write_slide
from wsi.errors import SlideNotFoundError

CONFIG = SegmentConfig(block_out=64, num_workers=2, device="cpu", runtime="torch", batch_size=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_bundle(tmp_path_factory.mktemp("bundle") / "small").path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SlideJob:
    return SlideJob(speckled_slide(tmp_path_factory.mktemp("slide") / "größe.svs"))


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[psutil.Process]]]:
    """Yield a function that returns the running processes of the test. None may be left at its end."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    start_silent_tracker()
    yield lambda: {psutil.Process(child.pid) for child in multiprocessing.active_children()}
    assert not multiprocessing.active_children()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork children from a process that has loaded torch: a new interpreter takes seconds to load it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.workers.in_process"])
    monkeypatch.setattr(child_process, "multiprocessing", SimpleNamespace(get_context=lambda _method: context))


@pytest.mark.full
@pytest.mark.parametrize("start", ["forked", full("spawned")])
def test_a_child_process_writes_the_same_bytes_and_reports_progress(
    tmp_path: Path, bundle: str, job: SlideJob, start: str, request: pytest.FixtureRequest
) -> None:
    if start == "forked":
        request.getfixturevalue("forked")
    here = segment_slide(job.path, tmp_path / "here", load_predictor(bundle, CONFIG), CONFIG)
    seen: list[tuple[str, int, int]] = []
    with open_workers("process", bundle, CONFIG, first=job) as workers:
        assert workers.slides_at_once == 1
        there = workers.segment(job, tmp_path / "there", lambda *step: seen.append(step))
        again = workers.segment(job, tmp_path / "there", no_progress)
        with pytest.raises(SlideNotFoundError, match=r"gone\.svs: no such file"):
            workers.segment(SlideJob(job.path.with_name("gone.svs")), tmp_path / "there", no_progress)
    assert (here.status, there.status, again.status) == ("done", "done", "skipped")
    assert here.folder is not None
    assert there.folder == tmp_path / "there" / "größe"
    assert data_of(there.folder) == data_of(here.folder)
    blocks = [done for stage, done, _ in seen if stage == "segmenting"]
    assert blocks == list(range(len(blocks)))
    assert len(blocks) > 5
    assert seen[-1][0] == "publishing"


@pytest.mark.full
def test_the_waiting_process_does_not_import_torch(tmp_path: Path, bundle: str, job: SlideJob) -> None:
    program = f"""
import sys
from pathlib import Path
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.workers.base import SlideJob
from pipeline.workers.open import open_workers
if __name__ == "__main__":
    with open_workers("process", {bundle!r}, SegmentConfig(block_out=64, device="cpu", runtime="torch")) as workers:
        (result,) = run_batch(
            [SlideJob(Path({str(job.path)!r}))], Path("out"), workers, lambda _: lambda *_: None, lambda _: None
        )
    print(result.status, "torch" in sys.modules)
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    child = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["done", "False"]
    (line,) = child.stderr.splitlines()
    assert line.startswith("WARNING: test: this model has no statistics of its training data")


@pytest.mark.full
def test_a_reader_crash_ends_the_child_process_and_not_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str
) -> None:
    # A real SIGSEGV in every Python process that starts from now on.
    (tmp_path / "sitecustomize.py").write_text("import tests.full.segfaulting\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    jobs = []
    # The first slide crashes while it is planned and the model loads.
    for name in ("crash", "between", "crash too", "last"):
        path = write_slide(tmp_path / f"{name}.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=1.0)
        jobs.append(SlideJob(path))
    config = SegmentConfig(block_out=64, num_workers=1, device="cpu", runtime="torch", backend="openslide")
    with open_workers("process", bundle, config, first=jobs[0]) as workers:
        results = run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert [result.status for result in results] == ["failed", "done", "failed", "done"]
    assert [results[n].error.partition(":")[0] for n in (0, 2)] == ["crash.svs", "crash too.svs"]
    assert results[0].error == (
        "crash.svs: its process crashed (SIGSEGV), most likely in the library that reads the slide; copy or scan the "
        "slide again, or try another --backend"
    )
    rows = {name: row["status"] for name, row in rows_of(tmp_path / "out").items()}
    assert rows == {"crash": "failed", "between": "done", "crash too": "failed", "last": "done"}


@pytest.mark.full
@pytest.mark.usefixtures("forked")
def test_a_slide_whose_process_was_killed_resumes_from_the_finished_blocks(
    tmp_path: Path, bundle: str, job: SlideJob, started: Callable[[], set[psutil.Process]]
) -> None:
    def kill(stage: str, done: int, _: int) -> None:
        if stage == "segmenting" and done == 3:
            (child,) = started()
            child.kill()

    with open_workers("process", bundle, CONFIG) as workers:
        with pytest.raises(WorkerLostError, match=r"größe\.svs: its process was killed") as caught:
            workers.segment(job, tmp_path, kill)
        assert is_transient(caught.value)
        result = workers.segment(job, tmp_path, no_progress)
    assert result.status == "done"
    assert result.resumed_blocks >= 3


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_process_that_somebody_ends_has_not_crashed(job: SlideJob, ended_by: signal.Signals) -> None:
    process = child_process.ChildProcess.__new__(child_process.ChildProcess)
    process._cancelled = threading.Event()
    process._process = SimpleNamespace(exitcode=-ended_by)  # type: ignore[assignment]
    error = process._lost(job)
    assert isinstance(error, WorkerLostError)
    assert ("because memory ran out" in str(error)) is (ended_by is signal.SIGKILL)
    assert not is_lasting(error)


@pytest.mark.full
def test_an_interrupt_ends_the_process_and_the_same_command_resumes(
    tmp_path: Path, bundle: str, job: SlideJob, started: Callable[[], set[psutil.Process]]
) -> None:
    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "segmenting" and done == 2:
            raise KeyboardInterrupt

    with open_workers("process", bundle, CONFIG) as workers:
        with pytest.raises(Cancelled, match=r"größe\.svs: interrupted; run the same command again to resume"):
            workers.segment(job, tmp_path, interrupt)
        assert not started()
        assert workers.segment(job, tmp_path, no_progress).resumed_blocks >= 2


@pytest.mark.full
@pytest.mark.usefixtures("forked")
def test_a_slide_that_takes_too_long_fails_and_the_next_one_is_done(tmp_path: Path, bundle: str, job: SlideJob) -> None:
    with open_workers("process", bundle, CONFIG, slide_timeout_s=0.3) as workers:
        with pytest.raises(SlideTimeoutError, match=r"größe\.svs: took longer than 0\.3 s and was stopped"):
            workers.segment(job, tmp_path, no_progress)
        missing = SlideJob(job.path.with_name("gone.svs"))
        with pytest.raises(SlideNotFoundError):
            workers.segment(missing, tmp_path, no_progress)


@pytest.mark.full
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("timeout_s", "poll_s"), [(3_000_000.0, None), (math.inf, 0.01)])
def test_any_long_timeout_can_be_used_and_inf_is_no_limit(
    tmp_path: Path, bundle: str, job: SlideJob, monkeypatch: pytest.MonkeyPatch, timeout_s: float, poll_s: float | None
) -> None:
    if poll_s is not None:
        monkeypatch.setattr(child_process, "_POLL_S", poll_s)
    with open_workers("process", bundle, CONFIG, slide_timeout_s=timeout_s) as workers:
        assert workers.segment(job, tmp_path, no_progress).status == "done"


@pytest.mark.usefixtures("forked")
def test_cancel_from_another_thread_ends_the_slide_at_once(tmp_path: Path, bundle: str, job: SlideJob) -> None:
    with open_workers("process", bundle, CONFIG) as workers:

        def cancel(stage: str, done: int, _: int) -> None:
            if stage == "segmenting" and done == 1:
                threading.Thread(target=workers.cancel).start()

        with pytest.raises(Cancelled, match=r"größe\.svs: cancelled; run the same command again"):
            workers.segment(job, tmp_path, cancel)
        with pytest.raises(Cancelled):
            workers.segment(job, tmp_path, no_progress)


@pytest.mark.usefixtures("forked")
def test_errors_in_the_model_or_the_settings_are_raised_before_any_slide(bundle: str, job: SlideJob) -> None:
    with (
        pytest.raises(UnknownBundleError, match="no-such: neither a shipped model"),
        open_workers("process", "no-such", CONFIG, first=job),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="--spread blocks needs several processes"),
        open_workers("process", bundle, CONFIG, spread="blocks"),
    ):
        pass


@pytest.mark.full
def test_a_child_process_exits_when_its_parent_is_killed(tmp_path: Path, bundle: str, job: SlideJob) -> None:
    program = f"""
import os, sys
from pathlib import Path
from pipeline.config import SegmentConfig
from pipeline.workers.base import SlideJob
from pipeline.workers.open import open_workers
if __name__ == "__main__":
    with open_workers("process", {bundle!r}, SegmentConfig(block_out=16, device="cpu", runtime="torch")) as workers:
        workers.segment(SlideJob(Path({str(job.path)!r})), Path("out"), lambda *step: print(*step, flush=True))
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith("segmenting 2 "):
            break
    family = psutil.Process(parent.pid).children()
    assert any("spawn_main" in " ".join(child.cmdline()) for child in family)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left
    assert not (tmp_path / "out" / "größe").exists()
    with open_workers(None, bundle, SegmentConfig(block_out=16, device="cpu", runtime="torch")) as workers:
        assert workers.segment(job, tmp_path / "out", no_progress).resumed_blocks >= 2


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.EAGAIN, "Resource temporarily unavailable); raise the limit of threads and processes (ulimit -u"),
        (errno.EMFILE, "Too many open files); raise the limit of open files (ulimit -n)"),
        (errno.EACCES, "Permission denied); run wsi-segment doctor"),
    ],
)
def test_a_process_that_the_machine_does_not_start_is_an_error_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    def refused(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refused)
    with pytest.raises(ClusterError) as caught:
        child_process.ChildProcess("colon-gland", SegmentConfig(device="cpu"))
    assert str(caught.value).startswith(f"the child process that segments the slides cannot start ({step}")


def test_a_process_that_is_killed_while_it_starts_most_likely_had_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = multiprocessing.process.BaseProcess.start

    def killed(process: multiprocessing.process.BaseProcess) -> None:
        start(process)
        process.kill()

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", killed)
    with pytest.raises(
        ClusterError, match=r"cannot start \(SIGKILL\), most likely because memory ran out; raise the limit of the con"
    ):
        child_process.ChildProcess("colon-gland", SegmentConfig(device="cpu"))
