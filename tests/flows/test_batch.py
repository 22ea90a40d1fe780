"""The flows against Prefect's test server, with real slides or with scripted workers."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import State
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)

from flows import parts, segmenting
from flows.artifacts import SlideProgress
from flows.batch import segment_batch
from flows.slide import segment_slide_flow
from pipeline.batch import window
from pipeline.errors import Cancelled, ClusterError, LockedError
from pipeline.results.record import write_run
from tests.cases import full
from tests.flows.servers import until
from tests.flows.shown import artifacts, newest_parent, newest_run, part_runs, table_of, task_states
from tests.pipeline.batch.scripted import ScriptedWorkers, StaleError, touched
from tests.pipeline.fakes import region_slide
from tests.pipeline.runs import make_run
from tests.pipeline.summaries import rows_of
from tests.slides import painted, write_slide
from wsi.errors import ResolutionError

pytestmark = pytest.mark.usefixtures("harness")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedWorkers:
    workers = ScriptedWorkers()

    @contextmanager
    def open_workers(*_: object, **__: object) -> Iterator[ScriptedWorkers]:
        yield workers

    monkeypatch.setattr(segmenting, "open_workers", open_workers)
    monkeypatch.setattr(window, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    return workers


@pytest.mark.full
def test_a_deployed_run_refuses_a_relative_results_folder(
    tmp_path: Path, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "one")
    state = run(touched(tmp_path / "in", "a"), Path("results"))
    assert state.is_failed()
    assert "output is 'results'; give an absolute path" in str(state.message)
    assert scripted.tried == []


def test_a_results_folder_inside_a_result_is_refused_before_any_slide(
    tmp_path: Path, scripted: ScriptedWorkers
) -> None:
    result = tmp_path / "Doe, Jane" / "a"
    result.mkdir(parents=True)
    write_run(result, make_run())
    state = run(touched(tmp_path / "in", "b"), result / "deep", hide_paths=True)
    assert state.is_failed()
    assert state.message == "output: (folder) is part of the result a; choose another folder"
    assert scripted.tried == []
    assert [path.name for path in result.iterdir()] == ["run.json"]


def test_a_server_that_is_unreachable_when_a_part_starts_stops_no_slide(
    tmp_path: Path, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(**_: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(parts, "PART", 2)
    monkeypatch.setattr(parts, "flow", lambda **_: lambda _: away)
    state = run(touched(tmp_path / "in", "a", "b", "c"), tmp_path / "out")
    assert state.is_completed()
    assert sorted(scripted.tried) == ["a", "b", "c"]
    assert {row["status"] for row in rows_of(tmp_path / "out").values()} == {"done"}


def test_a_pattern_that_is_too_long_for_a_path_matches_no_file(tmp_path: Path) -> None:
    state = run(tmp_path / ("n" * 300 + "*.svs"), tmp_path / "out")
    assert state.is_failed()
    assert "n*.svs: no file matches; check the pattern" in str(state.message)


def run(source: Path | str, output: Path, **options: Any) -> State[Any]:
    # Not the default model, to which plain colors are glass: a painted slide would have no tissue.
    return segment_batch(str(source), str(output), return_state=True, **{"model": "colon-gland", **options})


def test_a_batch_shows_the_outcome_of_each_slide_and_the_next_batch_skips_finished_slides(
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
    assert table["tissue"]["tissue_mm2"] == pytest.approx(0.6144, rel=0.02)
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

    # A touched slide is read and has the same content. Another slide with the same name has not.
    (slides / "tissue.svs").touch()
    write_slide(slides / "glass.svs", painted((600, 401)), mpp=1.0)
    state = run(slides, out)
    assert (state.name, state.message) == ("1 of 2 slides failed", "2 slides: 1 skipped, 1 failed")
    assert "holds the result of another run (other slide)" in rows_of(out)["glass"]["error"]


@pytest.mark.full
def test_a_slide_that_waits_for_its_retry_holds_no_slot(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOOK_S", 0.1)
    monkeypatch.setattr(window, "RETRY_DELAYS_S", (3.0,))
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
        ("a.svs", "Retrying"),
        ("b.svs", "Done"),
        ("c.svs", "Done"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"slide_timeout_s": float("nan"), "scheduler": "local"},
            "--slide-timeout is nan; it must be a positive number",
        ),
        ({"slide_timeout_s": 5.0}, "--slide-timeout needs processes that can be killed"),
        ({"scheduler": "local:99999"}, "--scheduler is 'local:99999'; N of local:N must be from 1 to"),
        ({"scheduler": "/srv/Doe/s.json", "hide_paths": True}, "--scheduler is 's.json'; it must be process, local"),
    ],
)
def test_workers_that_cannot_be_opened_are_refused_before_any_slide(
    tmp_path: Path, scripted: ScriptedWorkers, options: dict[str, Any], message: str
) -> None:
    state = run(touched(tmp_path / "in", "a"), tmp_path / "out", **options)
    assert state.is_failed()
    assert str(state.message).startswith(message)
    assert scripted.tried == []
    assert not (tmp_path / "out").exists()


def test_a_slide_that_stays_locked_for_longer_than_the_slide_timeout_fails(
    tmp_path: Path, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOOK_S", 0.1)
    scripted.script = {"a": [LockedError("a is locked") for _ in range(1000)]}
    state = run(touched(tmp_path / "in", "a"), tmp_path / "out", slide_timeout_s=0.3, scheduler="process")
    assert state.name == "1 of 1 slide failed"
    assert rows_of(tmp_path / "out")["a"]["error"] == "a is locked"


@pytest.mark.parametrize("hide_paths", [False, full(True)])
def test_rows_that_cannot_be_written_fail_the_run_and_are_shown(
    tmp_path: Path,
    harness: SyncPrefectClient,
    scripted: ScriptedWorkers,
    monkeypatch: pytest.MonkeyPatch,
    hide_paths: bool,
) -> None:
    def immutable(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("pipeline.batch.board.write_summary", immutable)
    out = tmp_path / "out"
    state = run(touched(tmp_path / "in", "a", "b"), out, hide_paths=hide_paths)
    missing = (
        f"{'(folder)' if hide_paths else out}: 2 rows of this run could not be written to summary.csv; the results"
    )
    assert (state.name, state.is_failed()) == ("summary.csv is incomplete", True)
    assert str(state.message).startswith(f"2 slides: 2 done\n\n{missing}")
    assert artifacts(harness, newest_run(harness))["table"].description.startswith(f"2 slides: 2 done\n\n{missing}")
    assert sorted(scripted.tried) == ["a", "b"]


@pytest.mark.full
def test_a_run_in_which_only_slides_failed_that_failed_before_is_completed(
    tmp_path: Path, scripted: ScriptedWorkers
) -> None:
    source, out = touched(tmp_path / "in", "a", "b"), tmp_path / "out"
    scripted.script = {"b": [ResolutionError("no mpp"), ResolutionError("no mpp")]}
    assert run(source, out).name == "1 of 2 slides failed"
    scripted.tried.clear()
    state = run(source, out)
    assert (state.name, state.message) == ("Completed", "2 slides: 1 done, 1 failed before, 0 new")
    assert scripted.tried == ["a"]
    assert rows_of(out)["b"]["error"] == "no mpp"
    assert run(source, out, retry_failed=True).name == "1 of 2 slides failed"
    state = run(source, out, retry_failed=True)
    assert (state.name, state.message) == ("Completed", "2 slides: 2 done")


@pytest.mark.full
def test_more_attempts_than_a_flow_run_should_hold_go_into_runs_of_their_own(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 2)
    scripted.script = {"c": [ResolutionError("no mpp")]}
    scripted.slides_at_once = 1
    state = run(touched(tmp_path / "in", *"abcde"), tmp_path / "out")
    assert (state.name, state.message) == ("1 of 5 slides failed", "5 slides: 4 done, 1 failed")
    run_id = newest_parent(harness)
    ended = {one.name: one.state.name for one in part_runs(harness, run_id) if one.state is not None}
    assert ended == {"part 1": "Completed", "part 2": "1 of 2 slides failed", "part 3": "Completed"}


@pytest.mark.full
def test_a_part_starts_while_the_last_slide_of_the_part_before_it_still_runs(
    tmp_path: Path, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 2)
    third = threading.Event()

    def before(name: str) -> None:
        if name == "d":
            third.set()
        if name == "a":
            assert third.wait(60)

    scripted.before = before
    assert run(touched(tmp_path / "in", *"abcd"), tmp_path / "out").message == "4 slides: 4 done"


@pytest.mark.full
def test_a_batch_that_is_interrupted_ends_its_parts(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 3)
    scripted.script = {"b": [Cancelled("stopped")]}
    scripted.slides_at_once = 1
    state = run(touched(tmp_path / "in", *"abcd"), tmp_path / "out")
    assert (state.type.value, state.message) == ("FAILED", "stopped")
    assert {one.state.name for one in part_runs(harness, newest_parent(harness)) if one.state} == {"Cancelled"}


@pytest.mark.full
def test_a_slide_whose_attempt_is_cancelled_is_shown_as_cancelled(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers
) -> None:
    scripted.script = {"a": [Cancelled("stopped")]}
    assert run(touched(tmp_path / "in", "a"), tmp_path / "out").message == "stopped"
    flow_run = newest_run(harness)
    assert task_states(harness, flow_run, 1) == {"a.svs": "Cancelled"}
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))

    def log() -> str | None:
        text = "\n".join(line.message for line in harness.read_logs(chosen))
        return text if "stopped" in text else None

    assert "Traceback" not in until(log, seconds=20, what="the log of the run")


@pytest.mark.full
def test_ctrl_c_ends_the_program_and_not_only_the_flow_run(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: SlideProgress, *, now: bool = False) -> None:
        if not now:
            raise KeyboardInterrupt

    monkeypatch.setattr(SlideProgress, "show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(touched(tmp_path / "in", "a"), tmp_path / "out")
    assert scripted.cancelled
    state = newest_run(harness).state
    assert state is not None
    assert state.type.value == "CRASHED"


def test_an_interrupted_run_leaves_the_table_of_finished_slides(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def lost(*_: object, **__: object) -> Iterator[ScriptedWorkers]:
        yield scripted
        raise ClusterError("tcp://cluster: is gone")

    monkeypatch.setattr(segmenting, "open_workers", lost)
    state = run(touched(tmp_path / "in", "a"), tmp_path / "out")
    assert (state.type.value, state.message) == ("FAILED", "tcp://cluster: is gone")
    assert table_of(harness, newest_run(harness))["a"]["status"] == "done"
    assert rows_of(tmp_path / "out")["a"]["status"] == "done"


def test_slides_at_once_limits_the_slides_in_flight(tmp_path: Path, scripted: ScriptedWorkers) -> None:
    scripted.slides_at_once = 3
    run(touched(tmp_path / "in", *"abcdef"), tmp_path / "out", slides_at_once=1)
    assert scripted.most == 1


@pytest.mark.full
def test_with_paths_hidden_no_folder_reaches_the_server(
    tmp_path: Path, harness: SyncPrefectClient, scripted: ScriptedWorkers, monkeypatch: pytest.MonkeyPatch
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
        log = "\n".join(line.message for line in harness.read_logs(chosen))
        return log if "b.svs is odd" in log and "Finished in state" in log else None

    log = until(logs, seconds=20, what="the log of the run")
    assert "RuntimeError" in log
    shown = [log, *(f"{one.description} {one.data}" for one in artifacts(harness, flow_run).values())]
    runs = harness.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
    shown += [f"{one.name} {one.task_inputs} {one.state and one.state.message}" for one in runs]
    assert any("a.svs: its result would have the same name as that of a.tif" in text for text in shown)
    # Prefect stores paths only in the parameters, as the user wrote them.
    assert all("Doe, Jane" not in text and str(tmp_path) not in text for text in shown)


@pytest.mark.parametrize(
    ("second_row", "message"),
    [
        ("Doe Jane/a.svs,2,,", "list.csv, line 3: a.svs is also in line 2, with another mpp, model or id"),
        ("./Doe Jane/a.svs,2,,", "list.csv, line 3: a.svs is also in line 2, with another mpp, model or id"),
        ("s3://Doe/Jane/b.svs,,,", "list.csv, line 3: the slide: b.svs is an address (s3://), which is not supported"),
        ("Doe Jane/b.svs,,Doe/Jane/m,", "list.csv, line 3: the column 'model' cannot be used: m: "),
        ("b.svs,,,Doe Jane/.b", "list.csv, line 3: id is '.b'; it must be a name"),
        ("Doe Jane/b\0/c.svs,,,", "list.csv, line 3: the column 'slide' contains a zero byte"),
    ],
)
def test_with_paths_hidden_an_error_in_a_manifest_names_no_folder(
    tmp_path: Path, scripted: ScriptedWorkers, second_row: str, message: str
) -> None:
    (tmp_path / "list.csv").write_text(f"slide,mpp,model,id\nDoe Jane/a.svs,1,,\n{second_row}\n")
    state = run(tmp_path / "list.csv", tmp_path / "out", hide_paths=True)
    assert str(state.message).startswith(message)
    assert "Doe" not in str(state.message)
    assert "Jane" not in str(state.message)


def test_with_paths_hidden_an_error_in_a_folder_that_a_glob_matches_does_not_name_the_folder(
    tmp_path: Path, scripted: ScriptedWorkers
) -> None:
    (tmp_path / "day-1" / "Doe, Jane").mkdir(parents=True)
    state = run(tmp_path / "day-*" / "*", tmp_path / "out", hide_paths=True)
    assert str(state.message).startswith("(folder): no slides in this folder (endings: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"settings": {"canvasm": 512}},
            r"settings: 'canvasm' is not a setting; the settings are mpp, backend, canvas_m",
        ),
        full({"settings": {"canvas_m": "half"}}, r"settings: canvas_m: Input should be a valid integer.*not 'half'"),
        ({"settings": {"mpp": True}}, r"settings: mpp is True; it cannot be true or false"),
        full({"settings": {"canvas_m": 100}}, r"canvas_m is 100; it must be a multiple of 32 from 128"),
        full({"model": "no-model"}, "no-model"),
        full({"slides_at_once": 0}, "slides_at_once is 0; it must be 1 or more"),
        ({"source": "*.nothing"}, "no file matches; check the pattern"),
    ],
)
def test_a_request_that_is_not_valid_fails_with_the_reason_and_writes_nothing(
    tmp_path: Path, scripted: ScriptedWorkers, options: dict[str, Any], message: str
) -> None:
    source = touched(tmp_path / "in", "a") / options.pop("source", "*.svs")
    state = run(source, tmp_path / "out", **options)
    assert state.is_failed()
    assert re.search(message, state.message or "")
    assert not (tmp_path / "out").exists()
    assert scripted.tried == []


@pytest.mark.full
def test_a_glob_and_a_manifest_are_sources_too(tmp_path: Path, scripted: ScriptedWorkers) -> None:
    for day in ("2026-01", "2026-02"):
        touched(tmp_path / day, f"slide {day}")
    assert run(tmp_path / "2026-*" / "*.svs", tmp_path / "a").message == "2 slides: 2 done"
    (tmp_path / "list.csv").write_text("slide,mpp,model\n2026-01/slide 2026-01.svs,0.5,colon-gland\n")
    assert run(tmp_path / "list.csv", tmp_path / "b").message == "1 slide: 1 done"
    assert sorted(set(scripted.tried)) == ["slide 2026-01", "slide 2026-02"]


def test_one_slide_is_a_flow_too(tmp_path: Path, scripted: ScriptedWorkers) -> None:
    slide = touched(tmp_path / "in", "a") / "a.svs"
    state: State[Any] = segment_slide_flow(str(slide), str(tmp_path / "out"), return_state=True)
    assert (state.name, state.message) == ("Completed", "1 slide: 1 done")
    state = segment_slide_flow(str(slide), str(tmp_path / "out"), settings={"a": 1}, return_state=True)
    assert state.message is not None
    assert state.message.startswith("settings: 'a' is not a setting")
