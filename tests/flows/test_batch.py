"""The flows against Prefect's test server, with real slides or with workers whose answers are known."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import State
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun

from flows import segmenting
from flows.batch import segment_batch
from flows.privacy import without_folders
from flows.slide import segment_slide_flow
from pipeline.errors import ClusterError, LockedError
from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from tests.flows.servers import until
from tests.pipeline.fakes import region_slide
from tests.pipeline.summaries import rows_of
from tests.slides import painted, write_slide
from wsi.errors import ResolutionError

pytestmark = pytest.mark.usefixtures("harness")


class StaleError(OSError):
    """A network mount that went away for a moment."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, "Stale file handle")


@dataclass
class Scripted:
    """Workers that do for each slide what is written down for it: raise, or make a result."""

    script: dict[str, list[Exception]] = field(default_factory=dict)
    slides_at_once: int = 2
    tried: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        pytest.fail("nothing cancels")

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        with self.lock:
            self.tried.append(job.path.stem)
            self.running += 1
            self.most = max(self.most, self.running)
        progress("segmenting", 1, 2)
        try:
            if self.script.get(job.path.stem):
                raise self.script[job.path.stem].pop(0)
            return SlideResult(job.path.stem, "done", 1.0, {"gland": 0.5}, columns={"tissue_mm2": 1.0})
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    workers = Scripted()

    @contextmanager
    def open_workers(*_: object, **__: object) -> Iterator[Scripted]:
        yield workers

    monkeypatch.setattr(segmenting, "open_workers", open_workers)
    monkeypatch.setattr(segmenting, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    return workers


def touched(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.svs").write_text(name)
    return folder


def test_a_deployed_run_refuses_a_folder_that_its_worker_will_delete(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "one")
    state = run(touched(tmp_path / "in", "a"), Path("results"))
    assert state.is_failed()
    assert "output is 'results'; give an absolute path" in str(state.message)
    assert scripted.tried == []


def test_a_server_that_goes_away_between_two_parts_stops_no_slide(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(segmenting, "PART", 2)
    monkeypatch.setattr(segmenting, "_part_flow", away)
    state = run(touched(tmp_path / "in", "a", "b", "c"), tmp_path / "out")
    assert state.is_completed()
    assert sorted(scripted.tried) == ["a", "b", "c"]
    assert {row["status"] for row in rows_of(tmp_path / "out").values()} == {"done"}


def test_hidden_folders_are_not_named_after_themselves() -> None:
    said = without_folders([Path("/data/Doe, Jane")])
    assert said("no slide in /data/Doe, Jane") == "no slide in (folder)"
    assert said("/data/Doe, Jane/a.svs: no mpp") == "a.svs: no mpp"


def run(source: Path | str, output: Path, **options: Any) -> State[Any]:
    return segment_batch(str(source), str(output), return_state=True, **options)


def newest_run(client: SyncPrefectClient) -> FlowRun:
    return max(client.read_flow_runs(), key=lambda one: one.created or 0)


def task_states(client: SyncPrefectClient, flow_run: FlowRun, count: int) -> dict[str, str]:
    """Names of the states of a run's tasks, which reach the server a moment after the run has ended."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))

    def ended() -> dict[str, str] | None:
        runs = client.read_task_runs(flow_run_filter=chosen)
        states = {one.name: one.state.name or "" for one in runs if one.state is not None and one.state.is_final()}
        return states if len(states) == count else None

    return until(ended, seconds=20, what=f"{count} task runs")


def artifacts(client: SyncPrefectClient, flow_run: FlowRun) -> dict[str, Any]:
    return {one.type or "": one for one in client.read_artifacts() if one.flow_run_id == flow_run.id}


def table_of(client: SyncPrefectClient, flow_run: FlowRun) -> dict[str, dict[str, Any]]:
    return {row["slide"]: row for row in json.loads(artifacts(client, flow_run)["table"].data)}


def test_a_batch_says_of_each_slide_how_it_ended_and_a_second_one_skips_what_is_done(
    tmp_path: Path, harness: SyncPrefectClient
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "My Results"
    slides.mkdir()
    region_slide(slides / "tissue.svs")
    write_slide(slides / "glass.svs", painted((600, 400)), mpp=1.0)
    (slides / "broken.svs").write_text("no slide")

    state = run(slides, out)
    assert (state.name, state.type.value, state.message) == (
        "1 of 3 slides failed",
        "FAILED",
        "3 slides: 1 done, 1 no tissue, 1 failed",
    )
    first = newest_run(harness)
    assert task_states(harness, first, 3) == {"tissue.svs": "Done", "glass.svs": "No tissue", "broken.svs": "Failed"}
    table = table_of(harness, first)
    assert list(table) == ["broken", "glass", "tissue"]
    assert table["tissue"]["preview"] == (out / "tissue" / "preview.png").as_uri()
    assert table["tissue"]["GeoJSON"] == (out / "tissue" / "tissue.geojson").as_uri()
    assert "blocks " in table["tissue"]["stages"]
    assert table["tissue"]["tissue mm²"] == pytest.approx(0.6144, rel=0.02)
    assert table["broken"]["error"].startswith("broken.svs: cannot be opened as a slide")
    assert artifacts(harness, first)["table"].key == "slides-my-results"
    assert artifacts(harness, first)["progress"].data == 100
    rows = rows_of(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        "tissue": "done",
        "glass": "no tissue",
        "broken": "failed",
    }
    assert "tissue" in (out / "index.html").read_text(encoding="utf-8")

    (slides / "broken.svs").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    state = run(slides, out)
    assert (state.name, state.message) == ("Completed", "2 slides: 2 skipped")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    second = newest_run(harness)
    assert {name: row["status"] for name, row in table_of(harness, second).items()} == {
        "tissue": "skipped",
        "glass": "skipped",
    }

    # A copy of the same slide is read, and found to be the same; another slide of that name is not.
    (slides / "tissue.svs").touch()
    assert run(slides, out).message == "2 slides: 2 skipped"
    write_slide(slides / "glass.svs", painted((600, 401)), mpp=1.0)
    assert run(slides, out).name == "1 of 2 slides failed"
    assert "holds the result of another run (other slide)" in rows_of(out)["glass"]["error"]


def test_only_what_passes_by_itself_is_tried_again(tmp_path: Path, scripted: Scripted) -> None:
    scripted.script = {
        "mount": [StaleError(), StaleError()],
        "gone": [StaleError() for _ in range(9)],
        "mpp": [ResolutionError("mpp")],
    }
    state = run(touched(tmp_path / "in", "mount", "gone", "mpp", "fine"), tmp_path / "out")
    assert state.name == "2 of 4 slides failed"
    assert {name: scripted.tried.count(name) for name in ("mount", "gone", "mpp", "fine")} == {
        "mount": 3,
        "gone": 4,
        "mpp": 1,
        "fine": 1,
    }
    assert rows_of(tmp_path / "out")["mpp"]["error"] == "mpp"


def test_a_slide_that_waits_for_its_next_try_holds_up_no_other(
    tmp_path: Path, harness: SyncPrefectClient, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenting, "LOOK_S", 0.1)
    monkeypatch.setattr(segmenting, "RETRY_DELAYS_S", (3.0,))
    scripted.script = {"a": [StaleError()]}
    state = run(touched(tmp_path / "in", "a", "b", "c"), tmp_path / "out", slides_at_once=1)
    assert (state.name, state.message) == ("Completed", "3 slides: 3 done")
    assert scripted.tried == ["a", "b", "c", "a"]
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[newest_run(harness).id]))

    def states() -> list[tuple[str, str]] | None:
        runs = harness.read_task_runs(flow_run_filter=chosen)
        found = sorted((one.name, one.state.name or "") for one in runs if one.state and one.state.is_final())
        return found if len(found) == 4 else None

    assert until(states, seconds=20, what="four tries") == [
        ("a.svs", "Done"),
        ("a.svs", "Put off"),
        ("b.svs", "Done"),
        ("c.svs", "Done"),
    ]


def test_a_slide_that_another_run_holds_comes_up_again_when_the_others_are_done(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenting, "LOOK_S", 0.1)
    scripted.script = {"a": [LockedError("a is held"), LockedError("a is held")]}
    state = run(touched(tmp_path / "in", "a", "b", "c"), tmp_path / "out", slides_at_once=1)
    assert (state.name, state.message) == ("Completed", "3 slides: 3 done")
    assert scripted.tried == ["a", "b", "c", "a", "a"]


def test_a_slide_that_is_held_for_longer_than_a_slide_may_take_fails(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenting, "LOOK_S", 0.1)
    scripted.script = {"a": [LockedError("a is held") for _ in range(1000)]}
    state = run(touched(tmp_path / "in", "a"), tmp_path / "out", slide_timeout_s=0.3)
    assert state.name == "1 of 1 slide failed"
    assert rows_of(tmp_path / "out")["a"]["error"] == "a is held"


def test_more_slides_than_a_run_should_hold_become_runs_of_their_own(
    tmp_path: Path, harness: SyncPrefectClient, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenting, "PART", 2)
    scripted.script = {"c": [ResolutionError("mpp")]}
    state = run(touched(tmp_path / "in", *"abcde"), tmp_path / "out")
    assert (state.name, state.message) == ("1 of 5 slides failed", "5 slides: 4 done, 1 failed")
    parts = {one.name: one.state for one in harness.read_flow_runs() if one.name.startswith("slides ")}
    assert {name: state.name for name, state in parts.items() if state} == {
        "slides 1 to 2 of 5": "Completed",
        "slides 3 to 4 of 5": "1 of 2 slides failed",
        "slides 5 to 5 of 5": "Completed",
    }


def test_a_run_that_is_broken_off_leaves_the_table_of_what_was_done(
    tmp_path: Path, harness: SyncPrefectClient, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def lost(*_: object, **__: object) -> Iterator[Scripted]:
        yield scripted
        raise ClusterError("tcp://cluster: is gone")

    monkeypatch.setattr(segmenting, "open_workers", lost)
    state = run(touched(tmp_path / "in", "a"), tmp_path / "out")
    assert (state.type.value, state.message) == ("FAILED", "tcp://cluster: is gone")
    assert table_of(harness, newest_run(harness))["a"]["status"] == "done"
    assert rows_of(tmp_path / "out")["a"]["status"] == "done"


def test_no_more_slides_run_at_a_time_than_are_asked_for(tmp_path: Path, scripted: Scripted) -> None:
    scripted.slides_at_once = 3
    run(touched(tmp_path / "in", *"abcdef"), tmp_path / "out", slides_at_once=1)
    assert scripted.most == 1


def test_with_paths_hidden_no_folder_reaches_the_server(
    tmp_path: Path, harness: SyncPrefectClient, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = touched(tmp_path / "Doe, Jane", "a", "b", "c")
    (slides / "a.tif").write_text("another a")
    stale = [OSError(errno.ESTALE, "Stale file handle", f"{slides}/c.svs") for _ in range(4)]
    scripted.script = {"b": [RuntimeError(f"{slides}/b.svs is odd")], "c": list(stale)}
    monkeypatch.chdir(tmp_path)
    run("Doe, Jane", Path("out"), hide_paths=True)
    flow_run = newest_run(harness)
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))

    def logs() -> str | None:
        said = "\n".join(line.message for line in harness.read_logs(chosen))
        return said if "b.svs is odd" in said and "Finished in state" in said else None

    said = until(logs, seconds=20, what="the log of the run")
    assert "RuntimeError" in said
    shown = [said, *(f"{one.description} {one.data}" for one in artifacts(harness, flow_run).values())]
    runs = harness.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
    shown += [f"{one.name} {one.task_inputs} {one.state and one.state.message}" for one in runs]
    assert any("a.svs: has the same name as a.tif" in text for text in shown)
    # The parameters, which the asker wrote, are the one place where Prefect keeps them.
    assert all("Doe, Jane" not in text and str(tmp_path) not in text for text in shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"overlp": 0.5}}, r"settings: 'overlp' is not known; known are mpp, backend, overlap"),
        ({"settings": {"overlap": "half"}}, r"settings: overlap: Input should be a valid number.*not 'half'"),
        ({"settings": {"overlap": 0.9}}, r"--overlap is 0.9; it must be from 0 to 0.75"),
        ({"model": "no-model"}, "no-model"),
        ({"slides_at_once": 0}, "slides_at_once is 0; it must be 1 or more"),
        ({"source": "*.nothing"}, "no file has such a name"),
    ],
)
def test_an_order_that_cannot_be_carried_out_fails_with_the_reason_and_leaves_nothing(
    tmp_path: Path, scripted: Scripted, options: dict[str, Any], message: str
) -> None:
    source = touched(tmp_path / "in", "a") / options.pop("source", "*.svs")
    state = run(source, tmp_path / "out", **options)
    assert state.is_failed()
    assert re.search(message, state.message or "")
    assert not (tmp_path / "out").exists()
    assert scripted.tried == []


def test_a_glob_and_a_manifest_are_sources_too(tmp_path: Path, scripted: Scripted) -> None:
    for day in ("2026-01", "2026-02"):
        touched(tmp_path / day, f"slide {day}")
    assert run(tmp_path / "2026-*" / "*.svs", tmp_path / "a").message == "2 slides: 2 done"
    (tmp_path / "list.csv").write_text("slide,mpp,model\n2026-01/slide 2026-01.svs,0.5,colon-gland\n")
    assert run(tmp_path / "list.csv", tmp_path / "b").message == "1 slide: 1 done"
    assert sorted(set(scripted.tried)) == ["slide 2026-01", "slide 2026-02"]


def test_one_slide_is_a_flow_too(tmp_path: Path, scripted: Scripted) -> None:
    slide = touched(tmp_path / "in", "a") / "a.svs"
    state: State[Any] = segment_slide_flow(str(slide), str(tmp_path / "out"), return_state=True)
    assert (state.name, state.message) == ("Completed", "1 slide: 1 done")
    state = segment_slide_flow(str(slide), str(tmp_path / "out"), settings={"a": 1}, return_state=True)
    assert state.message is not None
    assert state.message.startswith("settings: 'a' is not known")
