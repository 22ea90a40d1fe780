"""Clusters whose processes come and go. Scheduler and workers are real; they run as threads, which start at once."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Worker, get_worker

from models.predictor import Predictor
from pipeline.config import SegmentConfig
from pipeline.errors import ClusterError, OutputError, WorkerLostError
from pipeline.progress import no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.slide.blocks import BlockRecord
from pipeline.slide.recipe import segment_slide
from pipeline.workers.base import SlideJob, Spread
from pipeline.workers.cluster import tasks
from pipeline.workers.cluster.available import AvailableProcesses
from pipeline.workers.cluster.cluster import open_cluster
from pipeline.workers.cluster.tasks import Band, TaskContext, check_slide
from pipeline.workers.in_process import load_predictor
from pipeline.workers.open import open_workers
from tests.cases import full
from tests.flows.servers import free_port, until
from tests.pipeline.fakes import run_of
from tests.pipeline.small_bundle import small_bundle, speckled_slide
from tests.slides import small_slide
from wsi.errors import SlideReadError

CONFIG = SegmentConfig(block_out=64, num_workers=1, device="cpu", batch_size=4, runtime="torch")


GONE = "a.svs: the connection to the cluster is lost; run the same command again to resume from the finished blocks"


ASKED: ContextVar[object] = ContextVar("ASKED", default=None)
"""Name of the worker that answers. All workers answer on one thread, while their bands run on others."""


async def answer_as_worker(question: Callable[..., str], *arguments: object, dask_worker: Worker) -> str:
    ASKED.set(dask_worker.name)
    return question(*arguments)


@contextmanager
def cluster_of(workers: int, **options: Any) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=None,
        silence_logs=50,
        **options,
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_bundle(tmp_path_factory.mktemp("bundle") / "small").path)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.cluster.available.WARNING_S", 0.3)
    monkeypatch.setattr("pipeline.workers.cluster.available.REFRESH_S", 0.1)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "pipeline.workers.cluster.available"]


@pytest.mark.full
@pytest.mark.usefixtures("hurried")
def test_a_cluster_without_a_process_logs_one_warning_and_resumes(
    tmp_path: Path, bundle: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = SlideJob(small_slide(tmp_path / "a.svs"))
    waits, resumes = (
        "the cluster has no process; waiting for one",
        "a process of the cluster is available again; resuming",
    )
    with cluster_of(0) as cluster:

        def start_after_warning(times: int) -> threading.Thread:
            def start() -> None:
                until(lambda: messages(caplog).count(waits) == times, seconds=60, what="the warning")
                time.sleep(1.0)  # time for a second warning
                cluster.scale(1)

            thread = threading.Thread(target=start)
            thread.start()
            return thread

        first = start_after_warning(1)
        with open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:
            first.join()
            assert messages(caplog) == [waits, resumes]
            cluster.scale(0)
            until(
                lambda: cluster.scheduler is not None and not cluster.scheduler.workers,
                seconds=60,
                what="the end of the process",
            )
            second = start_after_warning(2)
            assert workers.segment(job, tmp_path / "out", no_progress).status == "done"
            second.join()
            # A slide this small may end before the next query of the cluster.
            until(
                lambda: workers.slides_at_once and messages(caplog).count(resumes) == 2,
                seconds=60,
                what="the second message",
            )
    assert messages(caplog) == [waits, resumes] * 2


@pytest.mark.usefixtures("hurried")
def test_a_process_with_a_gpu_that_starts_later_gets_all_later_slides(caplog: pytest.LogCaptureFixture) -> None:
    with cluster_of(1) as cluster, Client(cluster, set_as_default=False) as client:
        found, on_cpu = AvailableProcesses(client, gpu=True), AvailableProcesses(client, gpu=False)
        (plain,) = found.addresses(now=True)
        assert found.resources == {}
        cluster.new_spec = {**cluster.new_spec, "options": {**cluster.new_spec["options"], "resources": {"GPU": 1}}}
        cluster.scale(2)
        (with_gpu,) = until(
            lambda: [one for one in found.addresses(now=True) if one != plain],
            seconds=60,
            what="a process with a GPU",
        )
        assert (found.resources, found.addresses(now=True)) == ({"GPU": 1}, [with_gpu])
        assert (on_cpu.resources, set(on_cpu.addresses(now=True))) == ({}, {plain, with_gpu})
        # If the process exits, the slides wait for the next GPU, because a CPU would take hours for each slide.
        (number,) = (name for name, worker in cluster.workers.items() if worker.address == with_gpu)
        cluster.sync(cluster.workers[number].close)
        until(
            lambda: (
                not found.addresses() and messages(caplog) == ["the cluster has no process with a GPU; waiting for one"]
            ),
            seconds=60,
            what="the warning",
        )
        assert found.resources == {"GPU": 1}


@pytest.mark.full
@pytest.mark.parametrize("spread", [full("slides"), "blocks"])
def test_the_runtime_is_chosen_by_the_processes_and_not_by_the_client(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch, spread: Spread
) -> None:
    slide, out, config = small_slide(tmp_path / "a.svs"), tmp_path / "out", replace(CONFIG, runtime="auto")
    monkeypatch.setattr("pipeline.workers.cluster.tasks._predictors", {})
    monkeypatch.setattr("models.compute.choose_runtime", lambda *_: "torch")
    with cluster_of(2) as cluster, open_workers(cluster.scheduler_address, bundle, config, spread=spread) as workers:
        assert workers.segment(SlideJob(slide), out, no_progress).status == "done"
        assert run_of(out / "a")["identity"]["parameters"]["runtime"] == "torch"
        monkeypatch.undo()
        # If no runtime is requested, the existing result is kept; a request for another runtime is refused.
        assert workers.segment(SlideJob(slide), out, no_progress).status == "skipped"
    with pytest.raises(OutputError, match="holds the result of another run"):
        segment_slide(slide, out, as_openvino(bundle), replace(config, runtime="openvino"))
    assert segment_slide(slide, out, as_openvino(bundle), config).status == "skipped"
    forced = replace(config, force=True)
    assert segment_slide(slide, out, as_openvino(bundle), forced).status == "done"
    assert run_of(out / "a")["identity"]["parameters"]["runtime"] == "openvino"


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("package", ["torch", full("openvino")])
def test_a_worker_of_another_version_that_joins_later_is_left_out(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, package: str
) -> None:
    def version_of(name: str, worker: object) -> str:
        return "9.9.9" if (name, worker) == (package, 1) else version(name)

    def version_here(name: str) -> str:
        try:
            return version_of(name, get_worker().name)
        except ValueError:  # a thread that is not a worker's
            return version_of(name, ASKED.get())

    segment_band = tasks._segment_band
    joined, begun = threading.Event(), list[Band]()

    def one_and_then_wait(context: TaskContext, band: Band, task: Any) -> tuple[list[BlockRecord], str]:
        """Leave bands for the worker that joins late."""
        begun.append(band)
        assert len(begun) == 1 or joined.wait(60)
        return segment_band(context, band, task)

    monkeypatch.setattr("pipeline.workers.cluster.tasks._segment_band", one_and_then_wait)
    monkeypatch.setattr("pipeline.workers.cluster.checks.answer", answer_as_worker)
    monkeypatch.setattr("pipeline.results.record.version", version_here)
    config = replace(CONFIG, runtime="openvino" if package == "openvino" else "torch", batch_size=None)
    with cluster_of(1) as cluster, open_workers(cluster.scheduler_address, bundle, config, spread="blocks") as workers:

        def join(stage: str, done: int, total: int) -> None:
            if stage == "segmenting" and done == 1:
                cluster.scale(2)
                until(lambda: len(cluster.scheduler_info["workers"]) == 2, seconds=60, what="the second worker")
                joined.set()

        result = workers.segment(SlideJob(speckled_slide(tmp_path / "a.svs")), tmp_path / "out", join)
        assert result.status == "done"
        late = cluster.workers[1].address
    reason = f"has {package} 9.9.9 instead of {version(package)}; install the same versions everywhere"
    assert messages(caplog) == [f"worker {late} {reason}; the batch leaves this worker out"]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("case", ["joins later", full("breaks later"), full("lacks the second folder")])
def test_a_worker_that_alone_cannot_read_the_slides_is_left_out(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    broken = tmp_path / "broken"  # a file, because functions for workers are pickled

    async def answer_of(question: Callable[..., str], *arguments: object, dask_worker: Worker) -> str:
        if question is check_slide and dask_worker.name == 1 and broken.exists():
            return "cannot read the slide there (Permission denied); mount the folder there, at the same path"
        return question(*arguments)

    tried: list[object] = []

    def segmented(path: Path, *arguments: Any, **named: Any) -> SlideResult:
        tried.append(get_worker().name)
        if get_worker().name == 1 and broken.exists():
            raise SlideReadError(f"{path.name}: cannot be read") from PermissionError(errno.EACCES, "Permission denied")
        return segment_slide(path, *arguments, **named)

    monkeypatch.setattr("pipeline.workers.cluster.checks.answer", answer_of)
    monkeypatch.setattr("pipeline.workers.cluster.tasks.segment_slide", segmented)
    (tmp_path / "second").mkdir()
    folder = tmp_path / "second" if case == "lacks the second folder" else tmp_path
    first, *slides = [small_slide(tmp_path / "a.svs"), *(small_slide(folder / f"{name}.svs") for name in "bcd")]
    count = 1 if case == "joins later" else 2
    with cluster_of(count) as cluster, open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:

        def segment(slide: Path) -> str:
            return workers.segment(SlideJob(slide), tmp_path / "out", no_progress).status

        assert segment(first) == "done"
        broken.touch()
        cluster.scale(2)
        until(lambda: workers.slides_at_once == 3, seconds=60, what="the second worker")
        second, allowed = cluster.workers[1].address, AvailableProcesses.allowed

        def second_first(found: AvailableProcesses) -> list[str] | None:
            return allowed(found) if found.is_left_out(second) else [second]

        monkeypatch.setattr(AvailableProcesses, "allowed", second_first)
        assert [segment(slide) for slide in slides] == ["done"] * 3
        assert workers.slides_at_once == 2  # one process, and one that may join
        reason = "cannot read the slide there (Permission denied); mount the folder there, at the same path"
        assert messages(caplog) == [f"worker {second} {reason}; the batch leaves this worker out"]
    assert tried[1:].count(0) == 3
    assert tried[1:].count(1) == (0 if case == "lacks the second folder" else 1)


@pytest.mark.full
@pytest.mark.usefixtures("hurried")
def test_an_error_that_every_worker_would_meet_leaves_out_no_worker(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(path: Path, *_: Any, **__: Any) -> SlideResult:
        raise SlideReadError(f"{path.name}: cannot be read") from PermissionError(errno.EACCES, "Permission denied")

    async def refuses(question: Callable[..., str], *_: object) -> str:
        return "cannot read the slide there" if question is check_slide else ""

    slide = small_slide(tmp_path / "a.svs")
    with cluster_of(2) as cluster, open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:
        monkeypatch.setattr("pipeline.workers.cluster.checks.WorkerChecks.check_slide", lambda *_: None)
        monkeypatch.setattr("pipeline.workers.cluster.checks.answer", refuses)
        monkeypatch.setattr("pipeline.workers.cluster.tasks.segment_slide", fails)
        with pytest.raises(SlideReadError, match=r"^a\.svs: cannot be read$"):
            workers.segment(SlideJob(slide), tmp_path / "out", no_progress)
        assert workers.slides_at_once == 3
    assert messages(caplog) == []


@pytest.mark.full
@pytest.mark.usefixtures("hurried")
def test_a_slide_moves_to_a_left_out_worker_if_all_others_have_ended(tmp_path: Path, bundle: str) -> None:
    slide = speckled_slide(tmp_path / "a.svs")
    with (
        cluster_of(2) as cluster,
        open_cluster(cluster.scheduler_address, bundle, CONFIG, spread="slides", slide_timeout_s=None) as workers,
    ):
        workers._available.leave_out(cluster.workers[0].address, "is slow")
        ended: list[object] = []

        def end_the_other(stage: str, done: int, total: int) -> None:
            if stage == "segmenting" and not ended:
                ended.append(cluster.sync(cluster.workers[1].close))

        assert workers.segment(SlideJob(slide), tmp_path / "out", end_the_other).status == "done"
        assert len(ended) == 1


@pytest.mark.full
@pytest.mark.usefixtures("hurried")
def test_a_slide_runs_if_all_processes_that_are_present_are_left_out(tmp_path: Path, bundle: str) -> None:
    slide = small_slide(tmp_path / "a.svs")
    with (
        cluster_of(2) as cluster,
        open_cluster(cluster.scheduler_address, bundle, CONFIG, spread="slides", slide_timeout_s=30) as workers,
    ):
        for process in cluster.workers.values():
            workers._available.leave_out(process.address, "is slow")
        watchdog = threading.Timer(30, workers.cancel)
        watchdog.start()
        assert workers.segment(SlideJob(slide), tmp_path / "out", no_progress).status == "done"
        watchdog.cancel()


def test_a_runtime_that_only_the_workers_have_is_refused(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_here(name: str) -> str:
        if name == "openvino":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("pipeline.results.record.version", version_here)
    monkeypatch.setattr("pipeline.workers.cluster.tasks.load_predictor", lambda *_: as_openvino(bundle))
    monkeypatch.setattr("pipeline.workers.cluster.tasks._predictors", {})
    config = replace(CONFIG, runtime="auto")
    with (
        cluster_of(1) as cluster,
        open_workers(cluster.scheduler_address, bundle, config, spread="blocks") as workers,
        pytest.raises(ClusterError, match=r"^a\.svs: the workers compute with openvino, which is not installed here"),
    ):
        workers.segment(SlideJob(small_slide(tmp_path / "a.svs")), tmp_path / "out", no_progress)


def as_openvino(bundle: str) -> Predictor:
    """Return a torch predictor that states OpenVINO, because compiling takes long."""
    predictor = load_predictor(bundle, CONFIG)
    predictor.runtime = "openvino"
    return predictor


def test_a_process_that_hangs_in_a_stale_mount_is_named(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(*_: object) -> str:
        time.sleep(1)
        return ""

    monkeypatch.setattr("pipeline.workers.cluster.tasks.ANSWER_S", 0.2)
    monkeypatch.setattr("pipeline.workers.cluster.checks.check_folder", hangs)
    with cluster_of(1) as cluster, open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:
        start = time.monotonic()
        with pytest.raises(
            ClusterError, match=r"out: worker tcp://\S+ has not answered within 0\.2 s; a mount may be stale"
        ):
            workers.segment(SlideJob(tmp_path / "a.svs"), tmp_path / "out", no_progress)
        assert time.monotonic() - start < 2.5
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.full
def test_a_process_that_cannot_write_to_the_output_is_named_before_any_slide(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, out, mounted, write = small_slide(tmp_path / "a.svs"), tmp_path / "out", threading.Event(), Path.write_text

    def write_text(path: Path, text: str, **options: Any) -> int:
        """Refuse what the process of the cluster writes to the output. It is a thread here."""
        if path.parent == out and threading.current_thread() is not threading.main_thread() and not mounted.is_set():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with cluster_of(1) as cluster, open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:
        stages: list[str] = []
        with pytest.raises(
            ClusterError,
            match=r"/out: worker tcp://\S+ cannot write to the folder: Read-only file system; mount the folder read-wr",
        ):
            workers.segment(SlideJob(slide), out, lambda stage, *_: stages.append(stage))
        assert (stages, list(out.iterdir())) == ([], [])
        mounted.set()
        assert workers.segment(SlideJob(slide), out, no_progress).status == "done"


def test_a_process_that_cannot_read_the_slides_is_named_before_any_slide(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, other, asked = small_slide(tmp_path / "a.svs"), small_slide(tmp_path / "b.svs"), tmp_path / "asked"

    def check(path: Path) -> str:
        """Find no slide the first time that the process of the cluster is asked. It is a thread here."""
        if threading.current_thread() is threading.main_thread():
            return ""
        is_first = not asked.exists()
        with asked.open("a") as file:
            file.write(path.name)
        return check_slide(path.parent / "mounted over" / path.name if is_first else path)

    monkeypatch.setattr("pipeline.workers.cluster.checks.check_slide", check)
    with cluster_of(1) as cluster, open_workers(cluster.scheduler_address, bundle, CONFIG) as workers:
        with pytest.raises(
            ClusterError,
            match=r"/a\.svs: worker tcp://\S+ cannot read the slide there \(No such file or directory\); mount the fol",
        ):
            workers.segment(SlideJob(slide), tmp_path / "out", no_progress)
        assert workers.segment(SlideJob(slide), tmp_path / "out", no_progress).status == "done"
        assert workers.segment(SlideJob(other), tmp_path / "out", no_progress).status == "done"
    assert asked.read_text() == "a.svsa.svs"  # a folder that all could read is not checked again


@pytest.mark.full
def test_runs_resume_when_the_scheduler_returns(tmp_path: Path, bundle: str) -> None:
    slide, port = speckled_slide(tmp_path / "a.svs"), free_port()
    lost: list[Exception] = []
    with cluster_of(0, scheduler_port=port) as first:
        first.scale(1)
        with open_cluster(f"tcp://127.0.0.1:{port}", bundle, CONFIG, spread="slides", slide_timeout_s=None) as workers:
            begun = threading.Event()

            def segment() -> None:
                try:
                    workers.segment(SlideJob(slide), tmp_path / "out", lambda *_: begun.set())
                except WorkerLostError as error:
                    lost.append(error)

            slide_thread = threading.Thread(target=segment)
            slide_thread.start()
            assert begun.wait(60)
            first.close()
            with cluster_of(1, scheduler_port=port):
                slide_thread.join()
                assert [str(error) for error in lost] == [GONE]
                seen: list[str] = []
                result = workers.segment(SlideJob(slide), tmp_path / "out", lambda stage, *_: seen.append(stage))
                assert result.status == "done"
                assert "segmenting" in seen
