"""What `hide_paths` hides, and the table of results. These tests need no server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows import segmenting
from flows.artifacts import show_table
from flows.order import BatchRequest
from flows.privacy import as_it_is, without_folders
from pipeline.batch.collect import collect_jobs
from pipeline.batch.names import name_clashes
from pipeline.config import SegmentConfig
from pipeline.console import printable
from pipeline.errors import ConfigError
from pipeline.files import printable_name
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from tests.flows.shown import shown_tables


def test_hidden_folders_are_replaced_whether_or_not_a_file_name_follows() -> None:
    shortened = without_folders([Path("/data/Doe, Jane")])
    assert shortened("no slide in /data/Doe, Jane") == "no slide in (folder)"
    assert shortened("/data/Doe, Jane/a.svs: no mpp") == "a.svs: no mpp"


def test_a_hidden_folder_is_replaced_only_as_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened = without_folders([Path("/data/slides"), Path("/data")])
    assert shortened("/data/slides_old/a.svs and /data/slides-2, /data/slides.") == (
        "slides_old/a.svs and slides-2, (folder)."
    )
    assert shortened("/mnt/data/a.svs, '/data/slides'; file:///data/slides/a.svs") == (
        "/mnt/data/a.svs, '(folder)'; file://a.svs"
    )
    monkeypatch.chdir(tmp_path)
    shortened = without_folders([Path("a"), Path("out/Doe, Jane"), Path(), Path("/")])
    assert shortened(f"a/bad.svs: has a border without tissue; {tmp_path}/a/bad.svs") == (
        "bad.svs: has a border without tissue; bad.svs"
    )
    assert shortened("a: no slides in out/Doe, Jane") == "(folder): no slides in (folder)"
    assert without_folders([])("/data/a.svs") == "/data/a.svs"


@pytest.mark.parametrize(
    "folder",
    ["/data/O'Brien", "/data/M\udcfcller", "/data/a\\b", "/data/Zoë", "/data/x\ny", "/data/[P1]", "/data/\x1b[31mx"],
)
def test_a_folder_is_hidden_in_every_spelling_of_messages(folder: str) -> None:
    shortened = without_folders([folder])
    file = f"{folder}/a.svs"
    quoted = f'{folder}/the "first".svs'
    assert shortened(f"{file}: bad") == "a.svs: bad"
    for text in (
        file,
        str(FileNotFoundError(2, "No file", file)),
        str(FileNotFoundError(2, "No file", quoted)),
        printable(file),
        printable_name(file),
        Path(file).as_uri(),
    ):
        assert "data" not in shortened(text), text
        assert shortened(text).rstrip("'\"").endswith(".svs"), text


def test_a_refused_name_of_a_result_does_not_show_the_folders_in_it(tmp_path: Path) -> None:
    job = SlideJob(tmp_path / "in/Doe\\Jane/a.svs", name="Doe\\Jane/a")
    request = BatchRequest([job], tmp_path / "out", "m", SegmentConfig(), hide_paths=True)
    error = request.redact(name_clashes([job])[job.path])
    assert error.startswith("a.svs: results are named after slides, and 'a' cannot be the name of a result (index.html")
    assert "Jane" not in error


def test_with_paths_hidden_only_the_folders_that_an_error_names_are_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"case-{number}/a.svs,\n" for number in range(100))
    (tmp_path / "list.csv").write_text(f"slide,id\n{rows}b.svs,case-7/.b\n")
    examined: set[str] = set()

    def realpath(path: str | Path) -> str:
        examined.add(str(path))
        return str(path)

    monkeypatch.setattr("flows.privacy.os.path.realpath", realpath)
    error = ConfigError("line 102: id is 'case-7/.b'")
    state = segmenting.refused(error, str(tmp_path / "list.csv"), hide_paths=True)
    assert state.message == "line 102: id is '.b'"
    assert {path for path in examined if "case" in path} == {"case-7", str(tmp_path / "case-7")}


def test_with_paths_hidden_the_folders_in_the_names_of_results_are_hidden_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BatchRequest(
        [SlideJob(tmp_path / "in/Doe, Jane/a.svs", place="Doe, Jane/a")], tmp_path / "out", "m", SegmentConfig(),
        hide_paths=True,
    )  # fmt: skip
    assert request.redact(f"{tmp_path}/out/Doe, Jane/a: holds another result") == "a: holds another result"
    assert request.redact("a.svs: its result Doe, Jane/a would lie inside") == "a.svs: its result a would lie inside"
    tables = shown_tables(monkeypatch)
    show_table(tmp_path, [SlideResult("Doe, Jane/a", "failed", 0.0)], request.redact, links=False)
    assert [row["slide"] for _, table in tables for row in table] == ["a"]


def test_with_paths_hidden_a_folder_that_cannot_be_searched_and_the_results_folder_have_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "Doe_Jane", tmp_path / "Smith_John"
    job = SlideJob(folder, name="Doe_Jane/", problem=f"{folder}: cannot be searched for slides")
    request = BatchRequest([job], output, "m", SegmentConfig(), hide_paths=True)
    tables = shown_tables(monkeypatch)
    result = SlideResult(job.result_name, "failed", 0.0, error=job.problem)
    show_table(output, [result], request.redact, links=False)
    show_table(output, [result], request.redact, links=True)
    (key, (row,)), (open_key, (open_row,)) = tables
    assert (row["slide"], row["error"]) == ("(folder)", "(folder): cannot be searched for slides")
    assert re.fullmatch(r"slides-[0-9a-f]{16}", key)
    assert (open_row["slide"], open_key) == ("Doe_Jane/", "slides-smith-john")


def test_with_paths_hidden_the_folders_of_models_and_of_the_targets_of_links_are_hidden_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.svs").symlink_to("/patients/Doe, Jane/gone.svs")
    jobs = [*collect_jobs([tmp_path / "in"]), SlideJob(tmp_path / "in/y.svs", model="/models/of/Doe/b")]
    request = BatchRequest(jobs, tmp_path / "out", "/models/of/Jane/a", SegmentConfig(), hide_paths=True)
    assert request.redact(jobs[0].problem).startswith("x.svs: is a link to gone.svs, which does not exist")
    assert request.redact("/models/of/Jane/a: model.json is missing") == "a: model.json is missing"
    assert request.redact("/models/of/Doe/b: model.json is missing") == "b: model.json is missing"


def test_a_class_with_the_name_tissue_does_not_replace_the_area_of_the_tissue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = shown_tables(monkeypatch)
    result = SlideResult("a", "done", 1.0, areas_mm2={"tissue": 0.25}, columns={"tissue_mm2": 2.5})
    show_table(tmp_path, [result], as_it_is, links=True)
    assert tables[0][1] == [
        {"slide": "a", "status": "done", "seconds": 1.0, "tissue_mm2": 2.5, "area_mm2 tissue": 0.25}
    ]
