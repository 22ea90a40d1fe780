from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from models.predictor import Predictor
from pipeline.cli import commands
from pipeline.cli import segment as cli
from pipeline.cli.export import app
from pipeline.results.record import record_digest
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from pipeline.slide.recipe import segment_slide
from pipeline.viewing.qupath.project import write_project
from tests.cases import full
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


def test_a_path_that_cannot_be_checked_is_a_usage_error(tmp_path: Path) -> None:
    code, stdout, stderr = run("check", tmp_path / "nowhere")
    assert (code, stdout) == (2, "")
    assert "does not exist" in stderr
    assert run("check", tmp_path)[0] == 2
    (tmp_path / "slide.svs").write_bytes(b"")
    assert "cannot be checked" in run("check", tmp_path / "slide.svs")[2]
    assert run("check")[0] == 2


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def change(path: Path, act: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    act(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def first_ring(document: Any) -> list[list[float]]:
    ring: list[list[float]] = document["features"][0]["geometry"]["coordinates"][0]
    return ring


def rewrite_parquet(path: Path, act: Callable[[pa.Table], pa.Table]) -> None:
    table = act(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def drop_label_level(labels: Path) -> None:
    shutil.rmtree(labels / "4")
    change(labels / ".zattrs", lambda d: d["multiscales"][0]["datasets"].pop())


def add_pen(result: Path) -> None:
    """Add an area of pen that the run did not find."""
    document = json.loads((result / f"{result.name}.geojson").read_text(encoding="utf-8"))
    del document["features"][1:]
    document["features"][0]["properties"]["classification"]["name"] = "pen*"
    content = json.dumps(document).encode()
    (result / "left-out.geojson").write_bytes(content)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change(result / "run.json", lambda d: d["digests"].update({"left-out.geojson": facts}))
    values = json.loads((result / "run.json").read_text(encoding="utf-8"))
    change(result / "run.json", lambda d: d.update(sha256=record_digest(values)))


GEOJSON, STORE, XML = "a/a.geojson", "a/a.ome.zarr", "a/a.ome.zarr/OME/METADATA.ome.xml"
TILES = "qupath/maps/a/a.tiles.geojson"

FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # the damage, the file that the check names, and the message
    "no preview": (lambda r: (r / "a/preview.png").unlink(), "a/preview.png", "is missing"),
    "empty preview": (lambda r: (r / "a/preview.png").write_bytes(b""), "a/preview.png", "is empty"),
    "no map": (lambda r: shutil.rmtree(r / STORE), STORE, "is missing"),
    "no polygons": (lambda r: (r / GEOJSON).unlink(), GEOJSON, "is missing"),
    "run.json cut": (lambda r: (r / "a/run.json").write_text("{"), "a/run.json", "does not list the outputs"),
    "run.json of others": (lambda r: (r / "a/run.json").write_text("{}"), "a/run.json", "does not list the outputs"),
    "no result of a slide": (lambda r: shutil.rmtree(r / "b"), "summary.csv", "b is done but has no result"),
    "other summary": (lambda r: (r / "summary.csv").write_text("x\n1\n"), "summary.csv", "is not a summary of results"),
    "a feature less": (
        lambda r: change(r / GEOJSON, lambda d: d["features"].pop()),
        GEOJSON,
        "has 1 features, but run.json has 2 polygons",
    ),
    "cut GeoJSON": (
        lambda r: (r / GEOJSON).write_bytes((r / GEOJSON).read_bytes()[:-8]),
        GEOJSON,
        "not one JSON document",
    ),
    "no UTF-8": (lambda r: (r / GEOJSON).write_bytes(b'{"\xff":1}'), GEOJSON, "cannot be read"),
    "newline-delimited": (
        lambda r: (r / GEOJSON).write_text('{"type":"FeatureCollection","features":[]}\n{"type":"Feature"}'),
        GEOJSON,
        "text after the end",
    ),
    "comma too many": (lambda r: edit(r / GEOJSON, "\n]}", ",\n]}"), GEOJSON, "not one JSON document"),
    "unclosed ring": (
        lambda r: change(r / GEOJSON, lambda d: first_ring(d).pop()),
        GEOJSON,
        "feature 0: ring is not closed",
    ),
    "null name": (
        lambda r: change(r / GEOJSON, lambda d: d["features"][1]["properties"].update(name=None)),
        GEOJSON,
        "feature 1: value is null",
    ),
    "color as hex": (
        lambda r: change(
            r / GEOJSON, lambda d: d["features"][0]["properties"]["classification"].update(color="#ff0000")
        ),
        GEOJSON,
        "color is not a list of three",
    ),
    "same id": (
        lambda r: change(r / GEOJSON, lambda d: d["features"][1].update(id=d["features"][0]["id"])),
        GEOJSON,
        "occurs twice",
    ),
    "NaN": (lambda r: edit(r / GEOJSON, '"Area mm^2":', '"x":NaN,"Area mm^2":'), GEOJSON, "NaN is not valid JSON"),
    "a number of 5,000 digits": (
        lambda r: edit(r / GEOJSON, '"Area mm^2":', f'"x":{"9" * 5000},"Area mm^2":'),
        GEOJSON,
        "not one JSON document",
    ),
    "tile without measurements": (
        lambda r: change(r / TILES, lambda d: d["features"][3]["properties"].pop("measurements")),
        TILES,
        "feature 3: a property is missing",
    ),
    "tile off the grid": (
        lambda r: change(r / TILES, lambda d: first_ring(d)[1].__setitem__(0, 0.001)),
        TILES,
        "is not a multiple of 0.01",
    ),
    "cut Parquet": (
        lambda r: (r / "a/a.parquet").write_bytes((r / "a/a.parquet").read_bytes()[:99]),
        "a/a.parquet",
        "cannot be read",
    ),
    "a row less": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.slice(1)),
        "a/a.parquet",
        "has 1 rows, but run.json has 2 polygons",
    ),
    "another area": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.set_column(3, "area_mm2", [[9.0, 9.0]])),
        "a/a.parquet",
        "has 9 mm² of class-",
    ),
    "areas as text": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.set_column(3, "area_mm2", [["9", "9"]])),
        "a/a.parquet",
        "areas that are not numbers",
    ),
    "no geometry": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.drop_columns(["geometry"])),
        "a/a.parquet",
        "lacks the columns geometry",
    ),
    "plain Parquet": (
        lambda r: rewrite_parquet(r / "a/a.parquet", lambda t: t.replace_schema_metadata(None)),
        "a/a.parquet",
        "has no GeoParquet metadata",
    ),
    "zarr 3": (lambda r: (r / STORE / ".zgroup").unlink(), STORE, ".zgroup: No such file"),
    "no omero": (
        lambda r: change(r / STORE / ".zattrs", lambda d: d.pop("omero")),
        STORE,
        "metadata lacks the key 'omero'",
    ),
    "attributes cut": (lambda r: (r / STORE / ".zattrs").write_text("{"), STORE, "metadata is malformed"),
    "uncompressed": (
        lambda r: change(r / STORE / "0/.zarray", lambda d: d.update(compressor=None)),
        STORE,
        "0: codec is None",
    ),
    "bare zstd": (
        lambda r: change(r / STORE / "1/.zarray", lambda d: d.update(compressor={"id": "zstd", "level": 3})),
        STORE,
        "1: codec is {'id': 'zstd'",
    ),
    "float": (lambda r: change(r / STORE / "0/.zarray", lambda d: d.update(dtype="<f4")), STORE, "dtype is '<f4'"),
    "a level less": (
        lambda r: shutil.rmtree(r / STORE / "2"),
        STORE,
        "lists the levels ['0', '1', '2', '3', '4'], but the disk has",
    ),
    "labels of fewer levels": (
        lambda r: drop_label_level(r / STORE / "labels/classes"),
        STORE,
        "labels have the levels",
    ),
    "translation": (
        lambda r: change(
            r / STORE / ".zattrs",
            lambda d: d["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(
                {"type": "translation", "translation": [0, 1, 1]}
            ),
        ),
        STORE,
        "support only a scale",
    ),
    "other pixel size": (
        lambda r: edit(r / XML, 'PhysicalSizeX="4.0"', 'PhysicalSizeX="0.5"'),
        STORE,
        "OME-XML has the pixel size",
    ),
    "cut OME-XML": (lambda r: r.joinpath(XML).write_text("<OME"), STORE, "metadata is malformed"),
    "half-written chunk": (
        lambda r: (r / STORE / "0/0/0/0.5.partial").write_bytes(b""),
        STORE,
        "0/0/0/0.5.partial: is a partly written file",
    ),
    "an area that the run did not find": (
        lambda r: add_pen(r / "a"),
        "a/left-out.geojson",
        "has 1 areas of pen, but run.json has 0",
    ),
    "other areas": (
        lambda r: change(r / "a/run.json", lambda d: d.update(tissue_mm2=9.0)),
        "a/run.json",
        "other values than the run",
    ),
    "no digests": (
        lambda r: change(r / "a/run.json", lambda d: d.pop("digests")),
        "a/run.json",
        "does not have the digests",
    ),
    "other pixels": (lambda r: flip(r / "a/preview.png"), "a/preview.png", "has other content than the run wrote"),
    "a chunk flipped": (lambda r: flip(r / STORE / "0/0/1/2"), STORE, "0/0/1/2 has other content"),
    "a chunk cut": (lambda r: cut(r / STORE / "0/0/1/2"), STORE, "0/0/1/2 has"),
    "no chunk of labels": (
        lambda r: (r / STORE / "labels/classes/0/1/2").unlink(),
        STORE,
        "labels/classes/0/1/2 is missing",
    ),
    "two chunks swapped": (lambda r: swap(r / STORE / "0/0/1/1", r / STORE / "0/0/1/2"), STORE, "0/0/1/1 has"),
    "a changed listing": (lambda r: edit(r / "a/chunks.tsv", "0", "1"), "a/chunks.tsv", "has other content"),
    "consolidated metadata": (lambda r: (r / STORE / ".zmetadata").write_text("{}"), STORE, ".zmetadata is not a file"),
    "stray chunk": (lambda r: shutil.copytree(r / STORE / "0/0", r / STORE / "0/7"), STORE, "is not a chunk of shape"),
}


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


def test_files_that_people_add_and_a_removed_path_are_not_findings(results: Path) -> None:
    (results / "a/notes.txt").write_text("mine")
    (results / STORE / ".DS_Store").write_bytes(b"\0")
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
