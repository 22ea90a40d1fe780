from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.formats.outputs import OUTPUTS, Output, SegmentedSlide, file_description
from pipeline.results.record import read_run
from pipeline.slide.recipe import segment_slide
from tests.pipeline.fakes import SMALL, color_predictor
from tests.slides import small_slide


def test_one_entry_adds_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_areas(segmented: SegmentedSlide, folder: Path) -> None:
        lines = [f"{name}\t{area}\n" for name, area in segmented.measured[1].items()]
        (folder / f"{segmented.name}.tsv").write_text("".join(lines), encoding="utf-8")

    monkeypatch.setitem(OUTPUTS, "areas", Output("writing areas", {".tsv": "areas for spreadsheets"}, write_areas))
    steps: list[str] = []
    slide = small_slide(tmp_path / "a.svs")
    result = segment_slide(slide, tmp_path, color_predictor(), SMALL, lambda stage, *_: steps.append(stage))
    assert result.folder is not None
    run = read_run(result.folder)
    assert run is not None
    lines = (result.folder / "a.tsv").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{name}\t{area}" for name, area in run.class_areas_mm2.items()]
    assert "a.tsv" in run.outputs
    assert run.seconds["areas"] >= 0
    assert "writing areas" in steps
    assert "areas for spreadsheets" in (result.folder / "index.html").read_text(encoding="utf-8")


def test_the_pyramid_is_built_beside_the_polygons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = threading.Barrier(2, timeout=60)

    def met(output: Output) -> Output:
        def write(segmented: SegmentedSlide, folder: Path) -> None:
            meet.wait()  # raises BrokenBarrierError if the other one is not written meanwhile
            output.write(segmented, folder)

        return replace(output, write=write)

    for stage in ("join", "pyramid"):
        monkeypatch.setitem(OUTPUTS, stage, met(OUTPUTS[stage]))
    result = segment_slide(small_slide(tmp_path / "a.svs"), tmp_path, color_predictor(), SMALL)
    assert result.folder is not None
    run = read_run(result.folder)
    assert run is not None
    assert {"join", "pyramid"} <= set(run.seconds)


def test_an_error_is_raised_after_the_other_thread_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, ended = threading.Event(), []

    def broken(*_: object) -> None:
        threading.Timer(0.2, failed.set).start()
        raise OSError(errno.EIO, "Input/output error", "a file")

    def late(*_: object) -> None:
        ended.append(failed.wait(60))

    monkeypatch.setitem(OUTPUTS, "join", replace(OUTPUTS["join"], write=broken))
    monkeypatch.setitem(OUTPUTS, "pyramid", replace(OUTPUTS["pyramid"], write=late))
    with pytest.raises(OutputError, match="cannot write a file"):
        segment_slide(small_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert ended == [True]


@pytest.mark.parametrize("stage", ["join", "pyramid"])
def test_an_output_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "a file")

    monkeypatch.setitem(OUTPUTS, stage, replace(OUTPUTS[stage], write=broken))
    with pytest.raises(OutputError, match=r"a\.svs: cannot write a file: Input/output error"):
        segment_slide(small_slide(tmp_path / "a.svs"), tmp_path / "out", color_predictor(), SMALL)
    assert not (tmp_path / "out" / "a").exists()


def test_every_file_of_a_result_has_a_description() -> None:
    names = ["a.ome.zarr", "a.geojson", "a.parquet", "left-out.geojson", "preview.png", "run.json"]
    assert all(file_description(name) for name in names)
    assert file_description("notes.txt") == ""
    assert file_description("left-out.geojson").startswith("folds")
    assert file_description("a.geojson") == "polygons for QuPath"
