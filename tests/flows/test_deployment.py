"""Tests of batches deployed from deploy/prefect.yaml on a real server, with killed processes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from filelock import FileLock
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from flows.settings import ENVIRONMENT
from pipeline.results.folder import is_locked, lock_file
from tests.flows.servers import POOL, PrefectServer, free_port, kill, until
from tests.pipeline.fakes import published, run_of
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from tests.slides import PURPLE, painted, small_slide, write_slide

pytestmark = pytest.mark.full

# Blocks of a few tiles, so that a test can kill a run in the middle of a slide.
SETTINGS = {"block_out": 64, "device": "cpu", "num_workers": 1, "batch_size": 2}
BLOCKS = 20
"""Number of blocks of a slide of 1200×900 pixels."""
IN_PROCESS = {"scheduler": None, "slide_timeout_s": None}


@pytest.fixture(scope="module")
def deployed(server: PrefectServer) -> PrefectServer:
    """Return the server with the deployments of deploy/prefect.yaml and a worker for them."""
    for command in (
        ("work-pool", "create", POOL, "--type", "process"),
        ("--no-prompt", "deploy", "--all", "--prefect-file", str(REPOSITORY / "deploy" / "prefect.yaml")),
    ):
        whole = server.command(*command)
        done = subprocess.run(
            whole,
            env=server.environment | {"WSI_SCHEDULER": "local"},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    server.start_worker()
    return server


def ask(server: PrefectServer, source: Path, output: Path, **parameters: Any) -> UUID:
    """Request a batch of the on-demand deployment in the flow's own process, which starts fastest."""
    return ask_as_shipped(server, "on-demand", source, output, **IN_PROCESS | parameters)


def ask_as_shipped(server: PrefectServer, name: str, source: Path, output: Path, **parameters: Any) -> UUID:
    """Request a batch with the deployment's own scheduler and time limit."""
    with server.client() as client:
        deployment = client.read_deployment_by_name(f"segment-batch/{name}")
        wanted = {"source": str(source), "output": str(output), "settings": SETTINGS, **parameters}
        return client.create_flow_run_from_deployment(deployment.id, parameters=wanted).id


def read(server: PrefectServer, run: UUID) -> FlowRun:
    with server.client() as client:
        return client.read_flow_run(run)


def ended(server: PrefectServer, run: UUID, seconds: float = 300) -> FlowRun:
    def final() -> FlowRun | None:
        flow_run = read(server, run)
        return flow_run if flow_run.state is not None and flow_run.state.is_final() else None

    return until(final, seconds=seconds, what=f"the end of the run; see {server.folder}")


def name_of(run: FlowRun) -> str:
    assert run.state is not None
    return run.state.name or ""


def task_states(server: PrefectServer, run: UUID, count: int) -> list[tuple[str, str]]:
    """Wait until `count` tasks have ended. Return the slide and the state name of each."""

    def states() -> list[tuple[str, str]] | None:
        with server.client() as client:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        found = sorted((t.name, t.state.name or "") for t in tasks if t.state is not None and t.state.is_final())
        return found if len(found) >= count else None

    return until(states, seconds=120, what=f"{count} ended tasks")


def table_of(server: PrefectServer, run: UUID) -> dict[str, dict[str, Any]]:
    with server.client() as client:
        data = next(a.data for a in client.read_artifacts() if a.flow_run_id == run and a.type == "table")
    return {row["slide"]: row for row in json.loads(str(data))}


def small_slides(folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in names:
        small_slide(folder / f"{name}.svs")


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def journal_lines(output: Path, name: str) -> int:
    journal = output / f".{name}.work" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def undisturbed(source: Path, output: Path, server: PrefectServer) -> subprocess.Popen[bytes]:
    """Start a process that segments the same slides without Prefect."""
    script = f"""
from pathlib import Path
from flows.order import config_from_settings
from models.bundle import DEFAULT_BUNDLE
from pipeline.batch.collect import collect_jobs
from pipeline.batch.queue import run_batch
from pipeline.progress import no_progress
from pipeline.workers.open import open_workers
with open_workers(None, DEFAULT_BUNDLE, config_from_settings({SETTINGS!r})) as workers:
    run_batch(collect_jobs([Path({str(source)!r})]), Path({str(output)!r}), workers, lambda _: no_progress, print)
"""
    return server.begin("undisturbed", [sys.executable, "-c", script])


def test_flows_and_deployments_have_the_same_settings() -> None:
    lines = (REPOSITORY / "deploy" / "settings" / "settings.env").read_text(encoding="utf-8").splitlines()
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(lines)


def test_a_deployed_batch_segments_eight_slides_and_a_scheduled_run_skips_them(
    tmp_path: Path, deployed: PrefectServer
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    small_slides(slides, "a", "b", "c", "d", "e")
    write_slide(slides / "glass.svs", painted((300, 250)), mpp=1.0)
    (slides / "text.svs").write_text("no slide")
    whole = write_slide(slides / "torn.svs", painted((300, 250), ((20, 20, 200, 200), PURPLE)), mpp=1.0).read_bytes()
    (slides / "torn.svs").write_bytes(whole[: len(whole) // 2])

    run = ask(deployed, slides, out)
    assert name_of(ended(deployed, run)) == "2 of 8 slides failed"
    expected = {**dict.fromkeys("abcde", "done"), "glass": "no tissue", "text": "failed", "torn": "failed"}
    assert {slide: row["status"] for slide, row in table_of(deployed, run).items()} == expected
    assert {slide: row["status"] for slide, row in rows_of(out).items()} == expected
    assert dict(task_states(deployed, run, 8)) == {
        **{f"{name}.svs": "Done" for name in "abcde"},
        "glass.svs": "No tissue",
        "text.svs": "Failed",
        "torn.svs": "Failed",
    }

    for name in ("text", "torn"):
        (slides / f"{name}.svs").unlink()
    before = {path: files_of(path) for path in out.iterdir() if path.is_dir()}
    with deployed.client() as client:
        nightly = client.read_deployment_by_name("segment-batch/nightly")
    assert [one.state and one.state.name for one in scheduled(deployed, nightly.id)][:1] == ["Scheduled"]
    wanted = {"source": str(slides), "output": str(out), "settings": SETTINGS, **IN_PROCESS}
    begin = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    schedules = f"{deployed.url}/deployments/{nightly.id}/schedules"
    often = {"schedule": {"interval": 15, "anchor_date": begin}, "parameters": wanted}
    made = httpx.post(schedules, json=[often], timeout=30).raise_for_status().json()[0]

    def fired() -> FlowRun | None:
        ours = [one for one in scheduled(deployed, nightly.id) if one.parameters["source"] == str(slides)]
        return next((one for one in ours if one.state is not None and not one.state.is_scheduled()), None)

    first = until(fired, seconds=240, what="a run of the schedule")
    httpx.delete(f"{schedules}/{made['id']}", timeout=30).raise_for_status()
    second = ended(deployed, first.id)
    assert (name_of(second), second.state and second.state.message) == ("Completed", "6 slides: 6 skipped")
    assert {row["status"] for row in table_of(deployed, second.id).values()} == {"skipped"}
    assert {path: files_of(path) for path in before} == before


def scheduled(server: PrefectServer, deployment: UUID) -> list[FlowRun]:
    """Return the runs that the deployment's schedules have planned, the next run first."""
    body = {"deployments": {"id": {"any_": [str(deployment)]}}, "sort": "EXPECTED_START_TIME_ASC"}
    answer = httpx.post(f"{server.url}/flow_runs/filter", json=body, timeout=30).raise_for_status()
    return [FlowRun.model_validate(one) for one in answer.json() if one["auto_scheduled"]]


def test_a_killed_run_and_a_killed_worker_lose_no_finished_slide_or_block(
    tmp_path: Path, deployed: PrefectServer
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    small_slides(slides, "a")
    write_slide(slides / "long.svs", painted((1200, 900), ((20, 20, 1160, 860), PURPLE)), mpp=1.0)
    reference = undisturbed(slides, tmp_path / "undisturbed", deployed)

    run = ask(deployed, slides, out)
    until(lambda: journal_lines(out, "long") >= 3, seconds=240, what="three blocks")
    finished = files_of(out / "a")
    deployed.flow_process().kill()
    assert name_of(ended(deployed, run)) == "Crashed"
    survived = journal_lines(out, "long")

    run = ask(deployed, slides, out)
    until(lambda: journal_lines(out, "long") >= survived + 2, seconds=240, what="two more blocks")
    deployed.kill_worker()
    survived = journal_lines(out, "long")
    assert survived < BLOCKS

    deployed.start_worker()
    third = ask(deployed, slides, out)
    assert name_of(ended(deployed, third)) == "Completed"
    # No process was left to report the end of the second run. deploy/settings/automations.yaml does so after 90 s.
    assert name_of(read(deployed, run)) == "Running"
    assert {slide: row["status"] for slide, row in rows_of(out).items()} == {"a": "done", "long": "done"}
    assert [row["status"] for row in table_of(deployed, third).values()] == ["skipped", "done"]
    assert files_of(out / "a") == finished
    assert run_of(out / "long")["resumed_blocks"] >= survived - 1
    assert reference.wait(timeout=120) == 0
    assert published(out / "long") == published(tmp_path / "undisturbed" / "long")


def test_a_batch_survives_a_killed_server(tmp_path: Path, deployed: PrefectServer) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    small_slides(slides, *"abcdefgh")
    run = ask(deployed, slides, out)
    until((out / "a" / "run.json").exists, seconds=240, what="the first slide")
    deployed.kill()
    until((out / "d" / "run.json").exists, seconds=240, what="slides without a server")
    deployed.start()
    until((out / "h" / "run.json").exists, seconds=240, what="the last slide")
    assert name_of(ended(deployed, run)) == "Completed"
    assert {row["status"] for row in rows_of(out).values()} == {"done"}
    assert list(rows_of(out)) == list("abcdefgh")


def test_two_batches_into_one_folder_share_the_work(tmp_path: Path, deployed: PrefectServer) -> None:
    slides, out, names = tmp_path / "slides", tmp_path / "results", "abcdef"
    small_slides(slides, *names)
    out.mkdir()
    with ExitStack() as held:
        for name in names:
            held.enter_context(FileLock(lock_file(out, name)))
        runs = [ask(deployed, slides, out) for _ in range(2)]
        for run in runs:
            assert task_states(deployed, run, len(names)) == [(f"{name}.svs", "Locked") for name in names]
    # Both runs found every slide locked, and now retry all slides at the same time.
    both = [ended(deployed, run) for run in runs]
    assert [name_of(run) for run in both] == ["Completed", "Completed"]
    starts, ends = [run.start_time for run in both if run.start_time], [run.end_time for run in both if run.end_time]
    assert max(starts) < min(ends)
    tables = [table_of(deployed, run) for run in runs]
    ways = {name: sorted(table[name]["status"] for table in tables) for name in names}
    assert ways == {name: ["done", "skipped"] for name in names}
    assert [run_of(out / name)["status"] for name in names] == ["done"] * len(names)
    assert not [path for path in out.iterdir() if path.name.endswith((".work", ".lock", ".old"))]


def test_a_cancelled_run_leaves_no_process_or_lock_and_the_next_run_resumes(
    tmp_path: Path, deployed: PrefectServer
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    small_slides(slides, "a")
    write_slide(slides / "long.svs", painted((1200, 900), ((20, 20, 1160, 860), PURPLE)), mpp=1.0)
    run = ask_as_shipped(deployed, "nightly", slides, out)
    assert read(deployed, run).parameters["scheduler"] == "local"
    until(lambda: journal_lines(out, "long") >= 3, seconds=240, what="three blocks")
    processes = deployed.flow_process().children(recursive=True)
    assert len(processes) >= 1
    with deployed.client() as client:
        client.set_flow_run_state(run, Cancelling())
    assert name_of(ended(deployed, run)) == "Cancelled"
    assert psutil.wait_procs(processes, timeout=60)[1] == []
    assert not is_locked(out, "long")
    survived = journal_lines(out, "long")
    assert 3 <= survived < BLOCKS

    run = ask_as_shipped(deployed, "nightly", slides, out)
    assert name_of(ended(deployed, run)) == "Completed"
    assert [row["status"] for row in table_of(deployed, run).values()] == ["skipped", "done"]
    assert run_of(out / "long")["resumed_blocks"] >= survived - 1


def test_a_deployed_batch_runs_on_a_dask_cluster(tmp_path: Path, deployed: PrefectServer) -> None:
    slides, out = tmp_path / "slides", tmp_path / "results"
    small_slides(slides, "a", "b")
    host, port, dask = "127.0.0.1", str(free_port()), [sys.executable, "-m", "dask"]
    address = f"tcp://{host}:{port}"
    one_each = ["--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
    cluster = [
        deployed.begin("dask-scheduler", [*dask, "scheduler", "--host", host, "--port", port, "--no-dashboard"]),
        deployed.begin("dask-worker", [*dask, "worker", address, *one_each]),
    ]
    try:
        run = ask(deployed, slides, out, scheduler=address, slide_timeout_s=600)
        assert name_of(ended(deployed, run)) == "Completed"
    finally:
        for process in cluster:
            kill(process)
    assert {slide: row["status"] for slide, row in table_of(deployed, run).items()} == {"a": "done", "b": "done"}
    assert (deployed.folder / "dask-worker.log").read_text().count("Registered to") == 1
