from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.predictor import Predictor
from pipeline.cli import commands
from pipeline.cli import segment as cli
from pipeline.cli.export import app
from pipeline.results.names import GROUP
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.qupath.project import write_project
from tests.cases import full
from tests.pipeline.checks.faults import FAULTS, GEOJSON, STORE, change, cut, flip
from tests.pipeline.fakes import SMALL, color_predictor, region_slide, run_of


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of two slides, with a summary and a project with tiles."""
    root = tmp_path_factory.mktemp("export")
    results = [
        segment_slide(region_slide(root / name), root / "results", color_predictor(), SMALL)
        for name in ("a.svs", "b.svs")
    ]
    write_summary(root / "results", [*results, SlideResult("c", "failed", 1.0, error="c.svs: is not a slide")])
    write_project(root / "results", tiles=True)
    return root / "results"


@pytest.fixture
def results(segmented: Path, tmp_path: Path) -> Path:
    return shutil.copytree(segmented, tmp_path / "results")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_project_is_written_and_named(results: Path) -> None:
    shutil.rmtree(results / "qupath")
    assert run("qupath", results) == (0, f"{results / 'qupath' / 'project.qpproj'}\n", "")
    assert not list(results.rglob("*.tiles.geojson"))
    assert run("qupath", results, "--tiles")[0] == 0
    assert [path.name for path in sorted(results.rglob("*.tiles.geojson"))] == ["a.tiles.geojson", "b.tiles.geojson"]


def test_a_project_that_cannot_be_written_is_one_line_and_exit_1(tmp_path: Path) -> None:
    code, stdout, stderr = run("qupath", tmp_path)
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"wsi-export: {tmp_path}: no results of wsi-segment")
    assert stderr.count("\n") == 1
    code, _, stderr = run("qupath", tmp_path / ("n" * 300))
    assert (code, "cannot be read (File name too long); check the path" in stderr) == (1, True)


def test_results_of_a_linked_folder_are_checked_once(results: Path) -> None:
    (results / "group").mkdir()
    (results / "group" / GROUP).touch()
    (results / "a").rename(results / "group" / "a")
    (results / "group" / "again").symlink_to(".")
    stdout = run("check", "--quick", results)[1]
    assert stdout.count("run.json") == 2


def test_valid_results_pass_in_every_file(results: Path) -> None:
    code, stdout, stderr = run("check", results)
    assert (code, stderr) == (0, "")
    good = {line.removeprefix("good  ") for line in stdout.splitlines()}
    assert good == {
        *(str(results / name / file) for name in "ab" for file in run_of(results / name)["outputs"]),
        *(str(results / "qupath" / "maps" / name / f"{name}.tiles.geojson") for name in "ab"),
        str(results / "summary.csv"),
    }
    assert run("check", "--quiet", results) == (0, "", "")


def test_single_files_stores_and_slides_are_checked_too(results: Path) -> None:
    folder = results / "a"
    code, stdout, _ = run("check", folder, folder / "a.geojson", folder / "a.ome.zarr")
    assert code == 0
    checked = [line.split("/")[-1] for line in stdout.splitlines()]
    assert sorted(checked) == sorted([*run_of(folder)["outputs"], "a.geojson", "a.ome.zarr"])


@pytest.mark.full
def test_polygons_that_the_left_out_areas_have_overwritten_are_found(tmp_path: Path) -> None:
    segment_slide(region_slide(tmp_path / "left-out.svs"), tmp_path / "results", color_predictor(), SMALL)
    polygons = run_of(tmp_path / "results/left-out")["polygons"]
    code, stdout, _ = run("check", "--quiet", tmp_path / "results")
    assert code == 1
    assert f"has 0 features, but run.json has {polygons} polygons" in stdout


@pytest.mark.full
def test_the_folder_of_a_slide_can_be_named_like_a_geojson_file(tmp_path: Path) -> None:
    segment_slide(region_slide(tmp_path / "a.geojson.svs"), tmp_path / "results", color_predictor(), SMALL)
    write_project(tmp_path / "results", tiles=True)
    assert run("check", "--quiet", tmp_path / "results") == (0, "", "")


def test_a_path_that_cannot_be_checked_is_a_usage_error(tmp_path: Path) -> None:
    code, stdout, stderr = run("check", tmp_path / "nowhere")
    assert (code, stdout) == (2, "")
    assert "does not exist" in stderr
    assert run("check", tmp_path)[0] == 2
    (tmp_path / "slide.svs").write_bytes(b"")
    assert "cannot be checked" in run("check", tmp_path / "slide.svs")[2]
    status, _, stderr = run("check", tmp_path / ("n" * 300))
    assert (status, "cannot be read (File name too long); check the path" in stderr) == (2, True)
    assert run("check")[0] == 2


@pytest.mark.parametrize("fault", [full(name) if number % 3 else name for number, name in enumerate(FAULTS)])
def test_the_check_finds(results: Path, fault: str) -> None:
    plant, file, words = FAULTS[fault]
    plant(results)
    code, stdout, _ = run("check", "--quiet", results)
    assert code == 1
    path, *findings = stdout.splitlines()
    assert path == f"wrong {results / file}"
    assert any(words in line for line in findings), findings
    assert str(results) not in "\n".join(findings)


def test_a_number_that_no_float_can_hold_is_another_area(results: Path) -> None:
    change(results / "a/run.json", lambda d: d["class_areas_mm2"].update({"class-0": 10**400}))
    code, stdout, _ = run("check", "--quiet", results)
    assert code == 1
    assert f"mm² of class-0, but run.json has {10**400}" in stdout


def test_the_quick_check_compares_sizes_and_reads_no_file_but_the_records(results: Path) -> None:
    flip(results / "a/preview.png")
    flip(results / STORE / "0/0/1/2")
    assert run("check", "--quick", "--quiet", results) == (0, "", "")
    cut(results / STORE / "0/0/1/2")
    (results / STORE / "labels/classes/0/1/2").unlink()
    code, stdout, _ = run("check", "--quick", "--quiet", results)
    assert code == 1
    path, *findings = stdout.splitlines()
    assert path == f"wrong {results / STORE}"
    assert [line.split()[0] for line in findings] == ["0/0/1/2", "labels/classes/0/1/2"]


def test_the_quick_check_of_a_folder_does_not_read_the_tiles_of_the_project(results: Path) -> None:
    tiles = results / "qupath/maps/a/a.tiles.geojson"
    tiles.write_text("[]")
    assert run("check", "--quiet", results)[1].startswith(f"wrong {tiles}\n")
    code, stdout, _ = run("check", "--quick", results)
    assert code == 0
    assert str(results / "summary.csv") in stdout
    assert ".tiles.geojson" not in stdout


def test_files_that_people_add_and_a_removed_path_are_not_findings(results: Path) -> None:
    (results / "a/notes.txt").write_text("mine")
    for name in (".DS_Store", "0/.DS_Store", "0/0/._0", "0/0/0/._0", "labels/classes/0/.DS_Store"):
        (results / STORE / name).write_bytes(b"\0")
    change(results / "a/run.json", lambda d: d["slide"].pop("path"))
    assert run("check", "--quiet", results) == (0, "", "")


def test_the_first_findings_are_shown_and_the_others_counted(results: Path) -> None:
    feature = json.loads((results / GEOJSON).read_text(encoding="utf-8"))["features"][0]
    document = {"type": "FeatureCollection", "features": [feature] * 50}
    (results / GEOJSON).write_text(json.dumps(document), encoding="utf-8")
    _, stdout, _ = run("check", results / GEOJSON)
    lines = stdout.splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1].strip() == "and 29 more"


def test_wsi_segment_writes_the_project_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = region_slide(tmp_path / "a.svs")
    monkeypatch.setattr(Predictor, "from_bundle", lambda *_, **__: color_predictor())
    project = tmp_path / "out" / "qupath" / "project.qpproj"
    command = ["-o", str(tmp_path / "out"), "--device", "cpu", "--qupath"]
    result = CliRunner().invoke(cli.app, [str(slide), *command])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(tmp_path / "out" / "a"), str(project)]
    assert run_of(tmp_path / "out" / "a")["slide"]["path"] == str(slide)
    assert json.loads(project.read_text(encoding="utf-8"))["images"][0]["imageName"] == "a.svs"


def test_a_failure_is_one_line_on_stderr_and_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.fail("wsi-any", "x.svs: is not a slide", 2)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "wsi-any: x.svs: is not a slide\n")


def test_names_that_are_not_text_are_printed_with_escaped_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    commands.run(lambda: print("caf\udce9.svs", flush=True))
    assert written.getvalue() == b"caf\\udce9.svs\n"


def test_help_answers_without_the_heavy_libraries() -> None:
    code = "import sys, pipeline.cli.export; print(sorted({'torch', 'zarr', 'shapely', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
