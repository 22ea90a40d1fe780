"""Attacks on the promise: a setting that cannot hold is an error, and one that contradicts the slide is a warning."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile
from typer.testing import CliRunner

from models import runtimes
from models.bundle import load_bundle
from models.errors import RuntimeUnavailableError
from models.predictor import Predictor
from models.runtimes import check_precision
from pipeline.batch.collect import collect_jobs
from pipeline.cli.train import app as train_app
from pipeline.errors import ConfigError
from pipeline.files import local_path
from pipeline.results.record import read_run
from pipeline.slide.recipe import segment_slide
from tests.full.program import program
from tests.pipeline.fakes import SMALL, color_predictor
from tests.slides import PINK, painted, small_slide, write_slide
from wsi.errors import ResolutionError, SlideFormatError
from wsi.slide import open_slide

BOX = painted((300, 250), ((20, 20, 250, 200), PINK))


@pytest.mark.parametrize(
    ("own", "given", "warned"),
    [
        (0.5, 0.25, True),
        (0.5, 1.0, True),
        (0.5, 0.56, True),
        (0.5, 0.54, False),
        (0.5, 0.46, False),
        (None, 3.0, False),
    ],
)
def test_a_pixel_size_that_contradicts_the_file_is_a_warning_with_both_numbers(
    tmp_path: Path, own: float | None, given: float, warned: bool
) -> None:
    with open_slide(write_slide(tmp_path / "a.svs", BOX, mpp=own), given) as slide:
        assert slide.info.mpp == given
        expected = f"the given pixel size {given:g} µm/px is used, but the file states {own} µm/px"
        assert slide.info.warnings == ((expected,) if warned else ())


@pytest.mark.parametrize(
    ("given", "off"),
    [
        (0.05, "lengths are off by -90% along x and -92% along y, areas by -99%"),
        (0.55, "lengths are off by +10% along x and -8% along y, areas by +1%"),
        (2.0, "lengths are off by +300% along x and +233% along y, areas by +1233%"),
    ],
)
def test_a_single_size_for_pixels_that_are_not_square_is_a_warning_with_both_sides(
    tmp_path: Path, given: float, off: str
) -> None:
    path = tmp_path / "a.tif"
    per_cm = (1e4 / 0.5, 1e4 / 0.6)
    tifffile.imwrite(
        path,
        BOX,
        tile=(128, 128),
        photometric="rgb",
        metadata=None,
        resolution=per_cm,
        resolutionunit="CENTIMETER",
    )
    with pytest.raises(ResolutionError, match=r"pixels are not square \(0\.5×0\.6 µm\); pass --mpp"):
        open_slide(path)
    with open_slide(path, given) as slide:
        assert slide.info.mpp == given
        (warning,) = slide.info.warnings
    assert warning == (
        f"the given pixel size {given:g} µm/px is used, but its TIFF resolution gives 0.5×0.6 µm/px, and one size "
        f"cannot fit pixels that are not square: {off}"
    )


def test_the_warning_is_in_the_result(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.svs", BOX, mpp=0.5)
    (tmp_path / "list.csv").write_text("slide,mpp\na.svs,1.0\n")
    (job,) = collect_jobs([tmp_path / "list.csv"])
    segment_slide(path, tmp_path / "out", color_predictor(), replace(SMALL, mpp=job.mpp))
    run = read_run(tmp_path / "out" / "a")
    assert run is not None
    assert run.warnings == ("the given pixel size 1 µm/px is used, but the file states 0.5 µm/px",)


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://b/x", "https://host/a.svs", "FILE:///a", "abc+d.e-f://x"])
def test_addresses_are_refused_by_name_wherever_a_path_is_taken(tmp_path: Path, address: str) -> None:
    scheme = address.partition(":")[0]
    small_slide(tmp_path / "a.svs")
    (tmp_path / "slide.csv").write_text(f"slide\n{address}\n")
    (tmp_path / "model.csv").write_text(f"slide,model\na.svs,{address}\n")
    for path in (Path(address), tmp_path / "slide.csv", tmp_path / "model.csv"):
        with pytest.raises(
            ConfigError, match=rf"is an address \({scheme.replace('+', '.')}://\), which is not supported"
        ):
            collect_jobs([path])


def test_an_address_as_output_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slide(tmp_path / "a.svs")
    for arguments in (["-o", "s3://bucket/x"], ["-o", "out", "-m", "s3://bucket/model"]):
        done = program("a.svs", *arguments, folder=tmp_path, capture_output=True)
        assert done.returncode == 2
        assert b"is an address (s3://), which is not supported; copy the data" in done.stderr
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(train_app, ["data.toml", "-o", "s3://bucket/run"])
    assert "is an address (s3://)" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.svs"]


@pytest.mark.parametrize("path", ["C:/slides/a.svs", "a:b/c.svs", "/data/s3:/x", "slides"])
def test_a_path_with_a_colon_is_not_an_address(path: str) -> None:
    assert local_path(path, "it") == Path(path)


@pytest.mark.parametrize(
    ("flags", "precision", "use"),
    [
        ({"avx2"}, "fp16", "use float32"),
        ({"avx512_bf16"}, "fp16", "use float32 or bf16"),
        ({"avx512_fp16"}, "bf16", "use float32 or fp16"),
        ({"avx512_fp16"}, "fp16", None),
        ({"asimdhp", "bf16"}, "bf16", None),
        ({"avx2"}, "float32", None),
        (None, "fp16", None),
    ],
)
def test_a_precision_that_the_processor_would_emulate_is_refused(
    monkeypatch: pytest.MonkeyPatch, flags: set[str] | None, precision: str, use: str | None
) -> None:
    monkeypatch.setattr(runtimes, "processor_flags", lambda: flags and frozenset(flags))
    check_precision("cuda:0", precision)
    if use is None:
        check_precision("cpu", precision)
        return
    with pytest.raises(RuntimeUnavailableError, match=rf"precision {precision}: .*{use}$"):
        check_precision("cpu", precision)
    with pytest.raises(RuntimeUnavailableError, match="has no instructions for it"):
        Predictor.from_bundle(load_bundle("colon-gland"), device="cpu", precision=precision)


def test_a_huge_sparse_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"no slide")
    os.truncate(path, 1 << 40)
    monkeypatch.setattr("wsi.slide._file_digest", lambda _: pytest.fail("reads a terabyte"))
    with pytest.raises(SlideFormatError, match=r"a\.svs: cannot be opened as a slide"):
        segment_slide(path, tmp_path / "out", color_predictor(), SMALL)
