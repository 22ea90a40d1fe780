from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from models.tissue_class import TissueClass
from pipeline import files
from pipeline.errors import OutputError, RunRecordError
from pipeline.files import write_atomically
from pipeline.results.record import (
    Familiarity,
    read_header,
    read_run,
    record_is_unchanged,
    versions,
    write_run,
)
from pipeline.results.slide_result import COLUMNS, STATUSES, SlideResult, finished_result, skipped_result
from pipeline.results.summary import read_summary, write_summary
from tests.pipeline.ignored_case import ignore_case
from tests.pipeline.runs import IDENTITY, TUMOR, make_run
from tests.pipeline.summaries import rows_of
from tests.repository import REPOSITORY
from wsi.readers import reader_versions


def test_the_summary_replaces_the_rows_of_its_slides_and_keeps_all_others(tmp_path: Path) -> None:
    write_summary(
        tmp_path, [SlideResult("b", "done", 1.25, {"gland": 0.5}, {"tissue_mm2": 2.0}), SlideResult("c", "failed", 0.0)]
    )
    write_summary(
        tmp_path,
        [SlideResult("c", "done", 3.0, {"stroma": 0.25}, {"tissue_mm2": 1.0}), SlideResult("a", "no tissue", 0.1)],
    )
    rows = rows_of(tmp_path)
    assert [(name, row["status"]) for name, row in rows.items()] == [("a", "no tissue"), ("b", "done"), ("c", "done")]
    assert [row["area_mm2 gland"] for row in rows.values()] == ["", "0.5", ""]
    assert [row["area_mm2 stroma"] for row in rows.values()] == ["", "", "0.25"]
    assert rows["b"]["seconds"] == "1.2"
    assert list(rows["a"])[-2:] == ["warnings", "error"]
    assert [p.name for p in tmp_path.iterdir()] == ["summary.csv"]


@pytest.mark.full
def test_the_summary_replaces_the_row_of_another_spelling_if_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, lower = tmp_path / "A", tmp_path / "a"
    upper.mkdir()
    lower.mkdir()
    done = SlideResult("A", "done", 60.0, {"gland": 0.5}, {"tissue_mm2": 2.0}, folder=upper)
    skipped = SlideResult("a", "skipped", 0.1, {"gland": 0.5}, {"tissue_mm2": 2.0}, folder=lower)
    write_summary(tmp_path, [done])
    write_summary(tmp_path, [skipped])
    assert list(rows_of(tmp_path)) == ["A", "a"]
    (tmp_path / "summary.csv").unlink()
    write_summary(tmp_path, [done])
    ignore_case(monkeypatch)
    write_summary(tmp_path, [SlideResult("a", "failed", 0.1, error="a.svs: its name is that of A.svs")])
    assert list(rows_of(tmp_path)) == ["A", "a"]
    write_summary(tmp_path, [skipped])
    assert [(row["slide"], row["status"], row["error"]) for row in rows_of(tmp_path).values()] == [("a", "skipped", "")]


def test_commas_quotes_and_line_breaks_in_an_error_are_preserved(tmp_path: Path) -> None:
    error = 'größe 組織.svs: "bad", very\nbad'
    write_summary(tmp_path, [SlideResult("größe 組織", "failed", 0.0, error=error, warnings=("one", "two"))])
    write_summary(tmp_path, [SlideResult("other", "done", 0.0)])
    row = rows_of(tmp_path)["größe 組織"]
    assert (row["error"], row["warnings"]) == (error, "one; two")


def test_a_skipped_slide_keeps_the_row_of_the_run_that_made_its_result(tmp_path: Path) -> None:
    write_summary(tmp_path, [SlideResult("a", "done", 60.0, {"gland": 0.5}, {"tissue_mm2": 2.0})])
    write_summary(tmp_path, [SlideResult("a", "skipped", 0.1, {"gland": 0.5}, {"tissue_mm2": 2.0})])
    assert (rows_of(tmp_path)["a"]["status"], rows_of(tmp_path)["a"]["seconds"]) == ("done", "60.0")


@pytest.mark.parametrize("former", [[], [SlideResult("a", "failed", 0.0, error="a.svs: refused")]])
def test_a_skipped_slide_gets_a_row_if_the_summary_has_none(tmp_path: Path, former: list[SlideResult]) -> None:
    write_summary(tmp_path, former)
    write_summary(tmp_path, [SlideResult("a", "skipped", 0.1, {"gland": 0.5}, {"tissue_mm2": 2.0})])
    row = rows_of(tmp_path)["a"]
    assert (row["status"], row["area_mm2 gland"], row["error"]) == ("skipped", "0.5", "")


@pytest.mark.parametrize(
    "content",
    [
        b"name;age\nEve;7\n",
        b"name;age\n",
        b"A note without a line break",
        b"slide,status\na,done,too many\n",
        "slide\ngröße\n".encode("cp1252"),
        b"slide,area_mm2 glan\x00\na,0.5\n",
    ],
)
def test_a_table_of_another_program_is_refused_and_stays_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "summary.csv"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"summary\.csv: was not written by wsi-segment; move it away"):
        write_summary(tmp_path, [SlideResult("a", "done", 1.0)])
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["", "slide,status,seconds\n"])
def test_a_table_without_rows_is_filled(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.csv").write_text(content)
    write_summary(tmp_path, [SlideResult("a", "done", 1.0)])
    assert list(rows_of(tmp_path)) == ["a"]


def test_a_row_with_a_very_long_error_is_read_back(tmp_path: Path) -> None:
    write_summary(tmp_path, [SlideResult("a", "failed", 0.0, error="x" * 200_000)])
    write_summary(tmp_path, [SlideResult("b", "done", 1.0)])
    assert [len(str(row["error"])) for row in read_summary(tmp_path / "summary.csv").values()] == [200_000, 0]


def test_the_row_of_a_result_that_was_replaced_is_replaced_when_its_slide_is_skipped(tmp_path: Path) -> None:
    skipped = SlideResult("a", "skipped", 0.1, {"gland": 0.25}, {"tissue_mm2": 2.0})
    for areas_mm2, tissue_mm2 in (({"gland": 0.5}, 2.0), ({"gland": 0.25}, 3.0), ({"gland": 0.25, "fat": 1.0}, 2.0)):
        write_summary(tmp_path, [SlideResult("a", "done", 60.0, areas_mm2, {"tissue_mm2": tissue_mm2})])
        write_summary(tmp_path, [skipped])
        row = rows_of(tmp_path)["a"]
        assert (row["status"], row["seconds"], row["area_mm2 gland"], row["tissue_mm2"]) == (
            "skipped", "0.1", "0.25", "2.0"
        )  # fmt: skip
        assert not row.get("area_mm2 fat")


def test_a_slide_whose_name_is_not_valid_utf8_has_one_row(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for seconds in (1.0, 2.0):
        write_summary(tmp_path, [SlideResult(name, "done", seconds)])
    _, *rows = (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:3] for row in rows] == [["caf\\udce9", "done", "2.0"]]


def test_a_row_that_was_emptied_in_a_spreadsheet_is_not_a_slide(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("slide,status,seconds\na,done,1.0\n,,\n")
    assert list(read_summary(tmp_path / "summary.csv")) == ["a"]


def test_cells_that_a_row_of_a_summary_lacks_stay_empty(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("slide,status,warnings,error\na,done\n")
    write_summary(tmp_path, [SlideResult("b", "done", 1.0)])
    row = read_summary(tmp_path / "summary.csv")["a"]
    assert (row["status"], row["warnings"], row["error"]) == ("done", "", "")


def test_a_table_saved_by_a_spreadsheet_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_bytes(b"\xef\xbb\xbfslide,status\r\nold,done\r\n")
    write_summary(tmp_path, [SlideResult("new", "done", 1.0)])
    assert list(rows_of(tmp_path)) == ["new", "old"]


def test_a_crash_while_writing_keeps_the_earlier_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.csv"
    write_atomically(path, "former\n")

    def crash(_: Path) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", crash)
        with pytest.raises(RuntimeError):
            write_atomically(path, "new\n")
    assert path.read_text(encoding="utf-8") == "former\n"
    write_atomically(path, "new\n")
    assert path.read_text(encoding="utf-8") == "new\n"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.csv"]


def test_one_entry_adds_a_column_to_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "polygons", lambda run: run.polygons)
    write_summary(tmp_path, [finished_result("a", tmp_path / "a", make_run("a"), 1.0), SlideResult("b", "failed", 0.0)])
    assert [row["polygons"] for row in rows_of(tmp_path).values()] == ["1234", ""]
    columns = ["slide", "status", "seconds", "tissue_mm2", "unfamiliar_share", "polygons"]
    assert list(rows_of(tmp_path)["a"])[:6] == columns


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    background = TissueClass("glass", (255, 255, 255), "background")
    run = make_run("größe", classes=(TUMOR, background), bad_tiles_l0=((0, 0, 8, 8),), warnings=("a", "b"))
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run
    stored = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert stored["classes"] == [
        {"name": "tumor", "color": [255, 0, 0]},
        {"name": "glass", "color": [255, 255, 255], "role": "background"},
    ]
    assert stored["tiles"] == {"run": 400, "segmented": 100, "without class": 8, "unreadable": 0}
    assert (stored["plan"]["level"], stored["plan"]["map_size"], stored["plan"]["map_mpp"]) == (1, [1500, 1000], 4.0)


def test_a_slide_path_that_is_not_utf8_is_stored(tmp_path: Path) -> None:
    facts = make_run().slide.model_copy(update={"path": Path(os.fsdecode(b"/slides/caf\xe9.svs"))})
    run = make_run(slide=facts)
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run


def test_a_record_without_the_path_and_stamp_of_the_slide_is_read(tmp_path: Path) -> None:
    stored = make_run().model_dump(mode="json", by_alias=True)
    del stored["slide"]["path"], stored["slide"]["stamp"]
    (tmp_path / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    run = read_run(tmp_path)
    assert run is not None
    assert (run.slide.path, run.slide.stamp) == (None, "")


@pytest.mark.parametrize(
    "text", ["[1]", '{"identity": ', '{"identity": {}}', '{"name": "of another program"}', "[" * 99999]
)
def test_a_file_of_another_program_is_not_a_record(tmp_path: Path, text: str) -> None:
    assert read_run(tmp_path) is None
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    assert read_run(tmp_path) is None
    assert read_header(tmp_path) is None


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("polygons", "many", "polygons"),
        ("tissue_mm2", float("nan"), "tissue_mm2"),
        ("slide", {"name": "a.svs"}, "slide.size"),
        ("plan", {"level": 0}, "plan.grid.origin_lv"),
        ("classes", [{"name": "tumor", "color": [0, 0, 256]}], "classes.0.color.2"),
        ("class_areas_mm2", {"tumor": 1.0}, "class_areas_mm2"),
        ("outputs", ["../elsewhere.parquet"], "outputs.0"),
        ("status", "failed", "status"),
    ],
)
def test_a_damaged_record_is_refused_by_the_name_of_the_value(
    tmp_path: Path, key: str, value: object, named: str
) -> None:
    stored = make_run().model_dump(mode="json", by_alias=True) | {key: value}
    (tmp_path / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(RunRecordError, match=rf"run\.json: .*{re.escape(named)}.*segment the slide again with --force"):
        read_run(tmp_path)
    header = read_header(tmp_path)
    assert header is not None
    assert header.identity == IDENTITY.as_json()


@pytest.mark.parametrize("pixels", [0, 10**400])
def test_a_record_with_an_impossible_grid_is_refused(tmp_path: Path, pixels: int) -> None:
    stored = make_run().model_dump(mode="json", by_alias=True)
    stored["plan"]["m_per_out"] = pixels
    (tmp_path / "run.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(RunRecordError, match=r"run\.json: plan: .*segment the slide again with --force"):
        read_run(tmp_path)


def test_versions_name_every_library_that_decodes_resamples_or_writes_pixels() -> None:
    libraries = (
        "numpy",
        "scipy",
        "pillow",
        "pyarrow",
        "zarr",
        "numcodecs",
        "shapely",
        "timm",
    )
    assert {name: versions()[name] for name in libraries} == {name: version(name) for name in libraries}
    assert versions().items() >= reader_versions().items()
    assert {"openslide", "tifffile", "imagecodecs"} <= versions().keys()


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_versions_include_the_runtime_of_the_result() -> None:
    assert versions("openvino") == versions() | {"openvino": version("openvino")}
    assert "openvino" not in versions("torch")


def test_the_documented_columns_and_statuses_are_those_of_the_table(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "slides.md").read_text(encoding="utf-8")
    table = text[text.index("## Columns of summary.csv") :]
    documented = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    write_summary(tmp_path, [SlideResult("a", "done", 1.0, {"CLASS": 1.0})])
    assert (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()[0].split(",") == documented
    row = next(line for line in table.splitlines() if line.startswith("| `status`"))
    assert [name for name in STATUSES if f"`{name}`" not in row] == []


def test_a_skipped_slide_has_the_warnings_of_its_result(tmp_path: Path) -> None:
    result = skipped_result("a", tmp_path / "a", make_run(warnings=("folds cover 3 % of the tissue", "b")), 0.1)
    write_summary(tmp_path, [result])
    assert rows_of(tmp_path)["a"]["warnings"] == "folds cover 3 % of the tissue; b"


def test_a_skipped_slide_that_another_version_made_has_a_warning(tmp_path: Path) -> None:
    assert skipped_result("a", tmp_path / "a", make_run(versions=versions()), 0.1).warnings == ()
    (warning,) = skipped_result("a", tmp_path / "a", make_run(versions={"wsi-segment": "0.0.9"}), 0.1).warnings
    assert warning == f"made by wsi-segment 0.0.9 and kept by {version('wsi-segment')}; --force computes it again"


def test_a_named_pipe_in_place_of_a_record_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    assert read_header(tmp_path) is None
    assert read_run(tmp_path) is None
    assert not record_is_unchanged(tmp_path)


def test_the_warning_about_unfamiliar_tissue_stands_apart_from_the_others() -> None:
    for share, expected in ((0.6, ("first", ("second",))), (0.4, ("", ("first", "second")))):
        familiarity = Familiarity(unfamiliar_share=share, share_limit=0.5, l0_per_px=32.0)
        run = make_run(familiarity=familiarity, warnings=("first", "second"))
        assert (run.unfamiliar_warning, run.other_warnings) == expected
    assert make_run(warnings=("first",)).unfamiliar_warning == ""


def test_the_versions_of_a_result_are_read_from_older_records_too(tmp_path: Path) -> None:
    computed_with, made_by = {"device": "cpu", "processor": "x"}, {"versions": make_run().versions}
    for values in (computed_with, computed_with | made_by):
        write_run(tmp_path, make_run(computed_with=values))
        header = read_header(tmp_path)
        assert header is not None
        assert header.blocks_computed_with == computed_with | made_by
