"""Slides on real worker processes. The processes start once for all tests, because each loads torch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, WorkerPlugin

from models.bundle import load_bundle
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.errors import Cancelled, ClusterError, SlideTimeoutError, is_transient
from pipeline.progress import no_progress
from pipeline.results.record import installed_versions, read_run, versions
from pipeline.slide.recipe import segment_slide
from pipeline.workers.base import SlideJob, Spread
from pipeline.workers.cluster.cluster import bands, open_cluster
from pipeline.workers.cluster.local_processes import _end, process_count
from pipeline.workers.cluster.tasks import ModelRef, check_folder, check_worker
from pipeline.workers.in_process import load_predictor
from pipeline.workers.open import open_workers
from tests.pipeline.fakes import data_of
from tests.pipeline.small_bundle import small_bundle, speckled_slide
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from wsi.box import Box
from wsi.grid import Block

CONFIG = SegmentConfig(block_out=64, min_area_um2=0.0, num_workers=1, device="cpu", batch_size=4)
SPREADS: list[Spread] = ["slides", "blocks"]


class Traps(WorkerPlugin):
    """Makes slides of certain names kill the process that opens them, or make it hang."""

    def setup(self, worker: Any) -> None:
        from wsi.readers import READERS, OpenSlideReader

        def opened(path: Path) -> OpenSlideReader:
            if path.stem == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            if path.stem == "hanging":
                time.sleep(600)
            return OpenSlideReader(path)

        READERS["openslide"] = opened


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Yield the address of a cluster of two processes."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",  # None takes port 8787, which another cluster may have
            worker_dashboard_address=None,
            host="127.0.0.1",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(Traps())
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small").path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speckled_slide(tmp_path_factory.mktemp("slide") / "größe.svs")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, scheduler: str, bundle: Path, slide: Path) -> dict[str, bytes]:
    """Return the files of the slide's result when it is segmented in this process."""
    output = tmp_path_factory.mktemp("here")
    folder = segment_slide(slide, output, load_predictor(str(bundle), CONFIG), CONFIG).folder
    assert folder is not None
    files = data_of(folder)
    assert sum(name.startswith("größe.ome.zarr/0/") for name in files) > 20
    return files


def kill_a_worker(scheduler: str) -> int:
    """Kill a busy process, as the kernel does when memory runs out; return its id."""
    with Client(scheduler, set_as_default=False) as client:
        at_work = [address for address, keys in client.processing().items() if keys]
        busiest = psutil.Process(client.run(os.getpid, workers=at_work[:1])[at_work[0]])
    busiest.kill()
    return int(busiest.pid)


@pytest.mark.full
@pytest.mark.parametrize("spread", SPREADS)
def test_a_cluster_gives_the_same_bytes_as_this_process(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path, expected: dict[str, bytes], spread: Spread
) -> None:
    seen: list[tuple[str, int, int]] = []
    with open_workers(scheduler, str(bundle), CONFIG, spread=spread) as workers:
        assert workers.slides_at_once == (3 if spread == "slides" else 2)
        result = workers.segment(SlideJob(slide), tmp_path / "out", lambda *step: seen.append(step))
    assert (result.status, result.folder, result.slide) == ("done", tmp_path / "out" / "größe", "größe")
    assert result.folder is not None
    assert data_of(result.folder) == expected
    run = read_run(result.folder)
    assert run is not None
    total = run.plan.blocks
    assert ("segmenting", total, total) in seen
    assert seen[-1][0] == "publishing"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["größe"]


@pytest.mark.full
@pytest.mark.parametrize("spread", SPREADS)
def test_a_killed_worker_does_not_change_a_byte(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path, expected: dict[str, bytes], spread: Spread
) -> None:
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "segmenting" and 1 <= done < total - 2 and not killed:
            killed.append(kill_a_worker(scheduler))

    with open_workers(scheduler, str(bundle), CONFIG, spread=spread) as workers:
        result = workers.segment(SlideJob(slide), tmp_path / "out", progress)
    assert killed
    assert not psutil.pid_exists(killed[0])
    assert result.status == "done"
    assert spread == "blocks" or result.resumed_blocks >= 1
    assert result.folder is not None
    assert data_of(result.folder) == expected


@pytest.mark.full
@pytest.mark.parametrize("spread", SPREADS)
def test_an_interrupted_slide_resumes_from_its_finished_blocks(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path, expected: dict[str, bytes], spread: Spread
) -> None:
    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "segmenting" and done >= 1:
            raise KeyboardInterrupt

    with (
        pytest.raises((Cancelled, KeyboardInterrupt)),
        open_workers(scheduler, str(bundle), CONFIG, spread=spread) as workers,
    ):
        workers.segment(SlideJob(slide), tmp_path / "out", interrupt)
    with open_workers(scheduler, str(bundle), CONFIG, spread=spread) as workers:
        # The worker releases the lock when it notices that its task is cancelled.
        (result,) = run_batch([SlideJob(slide)], tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert result.status == "done", result.error
    assert result.resumed_blocks >= 1
    assert result.folder is not None
    assert data_of(result.folder) == expected


@pytest.mark.full
def test_a_slide_that_takes_too_long_fails_and_the_next_one_is_done(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path
) -> None:
    hanging = tmp_path / "hanging.svs"
    hanging.write_bytes(slide.read_bytes())
    start = time.monotonic()
    with open_workers(scheduler, str(bundle), CONFIG, slide_timeout_s=2.0) as workers:
        with pytest.raises(SlideTimeoutError, match=r"hanging\.svs: took longer than 2 s and was stopped") as caught:
            workers.segment(SlideJob(hanging), tmp_path / "out", no_progress)
        assert not is_transient(caught.value)
    assert time.monotonic() - start < 60
    with open_workers(scheduler, str(bundle), CONFIG) as workers:
        assert workers.segment(SlideJob(slide), tmp_path / "out", no_progress).status == "done"


@pytest.mark.full
def test_a_slide_that_kills_its_workers_fails_and_the_others_are_done(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path
) -> None:
    killer, missing = tmp_path / "killer.svs", tmp_path / "missing.svs"
    killer.write_bytes(slide.read_bytes())
    jobs = [SlideJob(killer), SlideJob(missing), SlideJob(slide)]
    with open_workers(scheduler, str(bundle), CONFIG) as workers:
        results = run_batch(jobs, tmp_path / "out", workers, lambda _: no_progress, lambda _: None)
    assert [r.status for r in results] == ["failed", "failed", "done"]
    assert results[0].error.startswith("killer.svs: every process that ran it died (2 processes)")
    assert results[1].error.startswith("missing.svs: no such file")
    assert {name: row["status"] for name, row in rows_of(tmp_path / "out").items()} == {
        "killer": "failed",
        "missing": "failed",
        "größe": "done",
    }


@pytest.mark.full
def test_a_worker_that_cannot_run_tasks_is_named_before_any_slide(
    tmp_path: Path, scheduler: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cluster(scheduler, str(bundle), CONFIG, spread="slides", slide_timeout_s=None) as cluster:
        with pytest.raises(
            ClusterError, match=r"worker tcp://\S+ cannot use the model: .* a different model is installed here"
        ):
            cluster.check(ModelRef(str(bundle), "0" * 64))
        for package in ("zarr", "openvino"):
            other = installed_versions() | {package: "1.0"}
            monkeypatch.setattr("pipeline.workers.cluster.checks.installed_versions", lambda other=other: other)
            with pytest.raises(ClusterError, match=rf"worker tcp://\S+ has {package} \S+ instead of 1\.0; install the"):
                cluster.check(ModelRef("colon-gland", "0" * 64))


@pytest.mark.full
def test_a_different_model_with_the_same_name_fails_the_slide(
    tmp_path: Path, scheduler: str, bundle: Path, slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_workers(scheduler, str(bundle), CONFIG) as workers:
        monkeypatch.setattr("pipeline.workers.cluster.cluster._model_ref", lambda _: ModelRef(str(bundle), "0" * 64))
        with pytest.raises(
            ClusterError, match=r"a different model is installed here \(digest \w{12} instead of 000000000000\)"
        ):
            workers.segment(SlideJob(slide), tmp_path / "out", no_progress)


@pytest.mark.full
def test_ctrl_c_ends_local_processes_and_prints_one_line(tmp_path: Path, bundle: Path, slide: Path) -> None:
    arguments = ["größe.svs", "-o", "out", "-m", str(bundle), "-j", "1", "--device", "cpu", "--scheduler", "local:2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.segment", *arguments],
        cwd=slide.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C reaches all processes of the terminal's group.
        start_new_session=True,
    )
    lock = slide.parent / "out" / ".größe.lock"
    end = time.monotonic() + 120
    while not lock.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), stderr
    about_the_model = ("model test is not shipped", "test: this model has no statistics")
    lines = [line for line in stderr.splitlines() if not line.startswith(about_the_model)]
    assert lines == ["wsi-segment: interrupted; run the same command again to resume"]
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert len(gone) == len(children)
    assert not alive
    assert not (slide.parent / "out" / "größe").exists()


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.cluster.cluster.CONNECT_S", 0.5)
    with (
        pytest.raises(ClusterError, match=r"^tcp://127\.0\.0\.1:9: the Dask scheduler does not answer"),
        open_workers("tcp://127.0.0.1:9", "colon-gland", CONFIG),
    ):
        pass


def test_a_process_that_exits_late_does_not_keep_the_others_from_being_closed() -> None:
    ended: list[str] = []

    class Late:
        async def close(self, timeout: float) -> None:
            raise TimeoutError(timeout)

    class InTime:
        async def close(self, timeout: float) -> None:
            await asyncio.sleep(0.01)
            ended.append(f"within {timeout} s")

    asyncio.run(_end(SimpleNamespace(workers={0: Late(), 1: InTime()})))  # type: ignore[arg-type]
    assert ended == ["within 0.5 s"]


def test_bands_hold_every_block_once_in_order() -> None:
    blocks = [Block(n, Box(0, 0, 1, 1)) for n in range(103)]
    for processes in (1, 3, 8, 200):
        found = bands(blocks, processes, in_flight=4)
        assert [block for band in found for block in band] == blocks
        assert max(map(len, found)) <= 16
        assert len(found) >= min(len(blocks), 4 * processes) / 2
    assert bands([], 2, 4) == []


def test_a_folder_that_a_worker_does_not_see_is_reported() -> None:
    assert "does not see the folder (No such file" in check_folder(Path("nowhere/x.probe"), "a")


def test_a_cuda_build_and_a_cpu_build_of_torch_are_the_same_version(bundle: Path) -> None:
    digest = load_predictor(str(bundle), CONFIG).digest
    plain = versions()["torch"].partition("+")[0]
    assert check_worker(versions() | {"torch": f"{plain}+cu999"}, ModelRef(str(bundle), digest)) == ""


def test_a_worker_needs_the_same_openvino_only_if_it_has_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelRef(str(bundle), load_bundle(str(bundle)).digest)
    needs, have = versions() | {"openvino": "2023.0.0"}, versions() | {"openvino": "2026.4.0"}
    monkeypatch.setattr("pipeline.workers.cluster.tasks.installed_versions", lambda: have)
    assert check_worker(needs, model).startswith("has openvino 2026.4.0 instead of 2023.0.0; install the same")
    assert check_worker(versions(), model) == ""
    monkeypatch.setattr("pipeline.workers.cluster.tasks.installed_versions", versions)
    assert check_worker(needs, model) == ""


@pytest.mark.full
def test_local_is_one_process_per_gpu_or_a_single_one() -> None:
    assert process_count("local", ["0", "3"]) == 2
    assert process_count("local", []) == 1
    assert process_count("local:5", ["0", "3"]) == 5
