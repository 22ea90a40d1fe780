"""Whatever a slide knows of its patient stays in the slide: nothing of it is in any output, log or answer."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient
from typer.testing import CliRunner

from pipeline.cli.export import app as export_app
from pipeline.pages.report_page import write_report
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import write_summary
from tests.full.fuzz_targets import speckled
from tests.pipeline.fakes import run_of
from tests.pipeline.small_bundle import small_bundle
from tests.repository import REPOSITORY

PLANTED = {
    "patient's name": "DOE^JANE^Q",
    "patient's number": "MRN-55910273",
    "barcode": "XQ77-4821-Z9",
    "scan date, Aperio's": "03/17/19",
    "scan time, Aperio's": "09:59:41",
    "scan date, TIFF's": "2019:03:17",
    "scanner": "SS7731CNTR",
    "operator": "b7d2-operator",
    "original file": "7319042-DOE",
    "computer": "PATHOLOGY-PC-31",
}
LABEL, MACRO = (0, 255, 0), (0, 0, 255)
"""Colors of the label's and the macro image's pixels: nothing on the slide is anywhere near them."""


def with_secrets(path: Path, mpp: float | None = 1.0) -> Path:
    """An Aperio slide with levels, thumbnail, label and macro image, and everything of `PLANTED` in its tags."""
    facts = [] if mpp is None else [f"MPP = {mpp}"]
    facts += [
        "Patient = " + PLANTED["patient's name"],
        "MRN = " + PLANTED["patient's number"],
        f"Barcode = {PLANTED['barcode']}",
        "Date = " + PLANTED["scan date, Aperio's"],
        "Time = " + PLANTED["scan time, Aperio's"],
        f"ScanScope ID = {PLANTED['scanner']}",
        f"User = {PLANTED['operator']}",
        f"Filename = {PLANTED['original file']}",
    ]
    text = "|".join(["Aperio Image Library v11.2.1 \r\n640x416", *facts])
    tags = [
        (315, "s", 0, PLANTED["operator"], True),
        (316, "s", 0, PLANTED["computer"], True),
    ]
    rgb_HWC = speckled()
    with tifffile.TiffWriter(path) as tiff:

        def write(image_HWC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], description: str, **options: Any) -> None:
            tiff.write(
                image_HWC,
                photometric="rgb",
                description=description,
                datetime="2019:03:17 09:59:41",
                software=PLANTED["scanner"],
                extratags=tags,
                metadata=None,
                **options,
            )

        write(rgb_HWC, text, tile=(128, 128), compression="adobe_deflate")
        write(rgb_HWC[::8, ::8], text)
        write(rgb_HWC[::4, ::4], text, tile=(128, 128), compression="adobe_deflate")
        header = "Aperio Image Library v11.2.1 \r\n"
        write(np.full((64, 48, 3), LABEL, np.uint8), f"{header}label 48x64", subfiletype=1)
        write(np.full((48, 96, 3), MACRO, np.uint8), f"{header}macro 96x48", subfiletype=9)
    return path


@dataclass(frozen=True)
class Ran:
    """What the commands left."""

    slide: Path
    output: Path
    printed: dict[str, str]
    """stdout, stderr and answers of the viewer, by their source."""
    answers: dict[str, bytes]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """wsi-segment --qupath -vv on a slide that works, one that is cut off and one without a pixel size; then the other
    commands on what there is."""
    from pipeline.viewing.viewer.app import make_app
    from pipeline.viewing.viewer.results import find_results

    folder = tmp_path_factory.mktemp("privacy")
    (folder / "slides").mkdir()
    slide = with_secrets(folder / "slides" / "good.svs")
    content = slide.read_bytes()
    (folder / "slides" / "cut.svs").write_bytes(content[: len(content) // 3])
    with_secrets(folder / "slides" / "bare.svs", mpp=None)
    bundle = small_bundle(folder / "small").path
    options = ["-o", "out", "-m", str(bundle), "--qupath", "-vv", "--device", "cpu", "--runtime", "torch"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.segment", "slides", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    printed = {"segment: stdout": done.stdout, "segment: stderr": done.stderr}
    for arguments in (["check", "out"], ["qupath", "out", "--tiles"]):
        with contextlib.chdir(folder):
            result = CliRunner().invoke(export_app, arguments)
        assert result.exit_code == 0, result.output
        printed["export " + " ".join(arguments)] = result.output
    answers = {}
    results = find_results(folder / "out")
    with TestClient(make_app(results, "ann"), base_url="http://127.0.0.1") as client:
        page = f"/slides/{results[0].id}/"
        data = f"{page}{results[0].version}/"
        facts = client.get(f"{data}facts.json").json()
        addresses = ["/", page, f"{data}facts.json", f"{data}identity.json", f"{data}outlines/0"]
        addresses += [f"{data}slide/{level}/0_0.jpg" for level in range(facts["slide"]["levels"])]
        addresses += [f"{data}class/0/0/0_0.png", f"{data}labels/3/0/0_0.png"]
        addresses += [f"{data}thumbnail.jpg", f"{data}values/0_0.json", f"{data}regions.geojson?numbers=0"]
        for address in addresses:
            answer = client.get(address)
            assert answer.status_code == 200, address
            answers[address] = repr(answer.headers).encode() + answer.content
            answers[f"body of {address}"] = answer.content
    return Ran(slide, folder / "out", printed, answers)


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder as it is, and what is packed in it as it is when it is unpacked."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        yield f"the name of {name}", name.encode()
        if path.is_file():
            content = path.read_bytes()
            yield name, content
            yield from unpacked(name, content)
        if (path / ".zarray").is_file():
            yield f"the values of {name}", np.asarray(zarr.open_array(path, mode="r")[:]).tobytes()


def unpacked(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    if name.endswith(".parquet"):
        with pq.ParquetFile(io.BytesIO(content)) as file:
            yield f"{name}: metadata", repr((file.schema_arrow.metadata, file.metadata.created_by)).encode()
            columns = [one for one in file.schema_arrow.names if one != "geometry"]
            yield f"{name}: rows", repr(file.read(columns).to_pylist()).encode()
    for kind, picture in pictures(name, content):
        yield f"{kind} of {name}: texts", repr((picture.info, dict(picture.getexif()))).encode()


def pictures(name: str, content: bytes) -> Iterator[tuple[str, Image.Image]]:
    """The pictures that a file is, or has in it."""
    if content.startswith((b"\x89PNG", b"\xff\xd8")):
        yield "picture", Image.open(io.BytesIO(content))
    for number, found in enumerate(re.findall(rb"data:image/\w+;base64,([A-Za-z0-9+/=]+)", content)):
        yield f"picture {number}", Image.open(io.BytesIO(base64.b64decode(found)))


def secrets_in(content: bytes) -> list[str]:
    """Which of `PLANTED` are in some bytes, as text of either width."""
    return [
        what
        for what, text in PLANTED.items()
        if text.encode() in content or text.encode("utf-16-le") in content or text.encode().hex().encode() in content
    ]


def has_color(picture: Image.Image, color: tuple[int, int, int]) -> bool:
    distance_HW = np.abs(np.asarray(picture.convert("RGBA").convert("RGB")).astype(int) - color).max(axis=2)
    return bool((distance_HW < 60).any())


def test_the_slide_does_tell_what_was_planted(ran: Ran) -> None:
    with openslide.OpenSlide(ran.slide) as slide:
        assert set(secrets_in(repr(dict(slide.properties)).encode())) == set(PLANTED)
        assert {"label", "macro", "thumbnail"} <= set(slide.associated_images)
        assert has_color(slide.associated_images["label"], LABEL)
        assert has_color(slide.associated_images["macro"], MACRO)
    with tifffile.TiffFile(ran.slide) as tiff:
        assert tiff.pages.first.tags["DateTime"].value == "2019:03:17 09:59:41"


def test_no_file_of_a_run_tells_it(ran: Ran) -> None:
    found = dict(contents(ran.output))
    names = " ".join(found)
    for kind in ("good/run.json", ".geojson", "good.parquet: metadata", "preview.png", "thumbnail.jpg", "index.html",
                 "summary.csv", "METADATA.ome.xml", "the values of good/good.ome.zarr/0", "project.qpproj",
                 "picture 0 of good/index.html: texts"):  # fmt: skip
        assert kind in names
    assert {name: told for name, content in found.items() if (told := secrets_in(content))} == {}


def test_no_log_tells_it_even_at_its_most_talkative(ran: Ran) -> None:
    assert "DEBUG" in ran.printed["segment: stderr"]
    assert re.search(r"failed +cut\.svs: ", ran.printed["segment: stderr"])
    assert re.search(r"failed +bare\.svs: does not contain micrometers per pixel", ran.printed["segment: stderr"])
    assert {name: told for name, text in ran.printed.items() if (told := secrets_in(text.encode()))} == {}


def test_no_answer_of_the_viewer_tells_it(ran: Ran) -> None:
    assert len(ran.answers) > 14
    assert {name: told for name, content in ran.answers.items() if (told := secrets_in(content))} == {}


def test_no_picture_shows_the_label_or_the_macro_image(ran: Ran) -> None:
    looked_at = []
    for name, content in [*contents(ran.output), *ran.answers.items()]:
        for kind, picture in pictures(name, content):
            looked_at.append(name)
            # The page's own icon and masks are of the classes' colors.
            assert not has_color(picture, LABEL), f"{kind} of {name}"
            assert not has_color(picture, MACRO), f"{kind} of {name}"
    assert {"good/preview.png", "good/thumbnail.jpg", "good/index.html"} <= set(looked_at)
    assert any(name.startswith("body of") and name.endswith("/thumbnail.jpg") for name in looked_at)
    assert sum("/slide/" in name for name in looked_at) >= 2


def test_run_json_holds_just_these_facts_of_a_slide(ran: Ran) -> None:
    run = run_of(ran.output / "good")
    assert set(run["slide"]) == {
        "name", "path", "size", "mpp", "mpp_source", "vendor", "backend", "bounds", "qupath_offset", "stamp"
    }  # fmt: skip
    assert set(run["identity"]) == {"format", "slide", "model", "parameters"}


def test_no_property_of_a_slide_is_in_run_json_but_its_maker_size_and_pixel_size(ran: Ran) -> None:
    text = (ran.output / "good" / "run.json").read_text(encoding="utf-8")
    with openslide.OpenSlide(ran.slide) as slide:
        told = {name for name, value in slide.properties.items() if len(value) > 3 and value in text}
    assert told <= {"openslide.vendor"} | {
        name for name in told if re.search(r"mpp|downsample|tile-|width|height", name)
    }


def test_folders_of_this_machine_are_in_run_json_for_the_viewer_and_not_on_the_pages(ran: Ran) -> None:
    folder = str(ran.slide.parent)
    run = json.loads((ran.output / "good" / "run.json").read_text(encoding="utf-8"))
    assert run["slide"]["path"] == str(ran.slide)
    for page in ("index.html", "good/index.html"):
        text = (ran.output / page).read_text(encoding="utf-8")
        assert folder not in text
        assert str(ran.output) not in text
    for address in ran.answers:
        assert folder.encode() not in ran.answers[address]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("a.svs: no such file at /data/Doe Jane/1971/a.svs; check", "a.svs: no such file at a.svs; check"),
        ("/mnt/x/a.svs: has the same name as /mnt/y/a.svs, and", "a.svs: has the same name as a.svs, and"),
        ("/out/a: holds the result of another run (other slide)", "a: holds the result of another run (other slide)"),
        (r"a.svs: cannot write C:\Users\Jane\out\a: full", "a.svs: cannot write a: full"),
        ("no such file at /pt/DOE, JOHN (MRN 12)/gone.svs; check", "no such file at gone.svs; check"),
        ("two files: /a, b/case (2)/x.svs, /a;b/c:d/y.svs and z", "two files: x.svs, y.svs and z"),
        ("(it is '/data/x/a.svs'), in 3 µm/px", "(it is 'a.svs'), in 3 µm/px"),
        ("cannot read (/data/it's (here/a.svs), 3 µm/px", "cannot read (a.svs), 3 µm/px"),
        (r"C:\Users\O'Brien\x.svs: is damaged", "x.svs: is damaged"),
        ("../Doe/x.svs: is not ~/Doe/y.svs; see ./Doe/z.svs", "x.svs: is not y.svs; see z.svs"),
        (
            "cannot open /d/a.svs (TIFF/JPEG), /d/b.TIF, 3/4 unreadable",
            "cannot open a.svs (TIFF/JPEG), b.TIF, 3/4 unreadable",
        ),
        ("a.svs: 1000 µm/px is too coarse, and/or 3 / 4", "a.svs: 1000 µm/px is too coarse, and/or 3 / 4"),
    ],
)
def test_the_report_leaves_folders_out_of_errors_and_the_summary_keeps_them(
    tmp_path: Path, error: str, shown: str
) -> None:
    write_summary(tmp_path, [SlideResult("a", "failed", 1.0, error=error)])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"<b>Error:</b> {shown}</li>" in html.unescape(text)
    assert error in (tmp_path / "summary.csv").read_text(encoding="utf-8")


def test_a_secret_is_found_wherever_it_may_hide(tmp_path: Path) -> None:
    secret = PLANTED["barcode"]
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", secret, zip=True)
    Image.new("RGB", (8, 8), LABEL).save(tmp_path / "text.png", pnginfo=info)
    exif = Image.Exif()
    exif[0x0131] = secret
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.jpg", exif=exif)
    table = pa.table({"id": [1]}).replace_schema_metadata({"note": secret})
    pq.write_table(table, tmp_path / "note.parquet", compression="zstd")
    zarr.save_array(tmp_path / "a.zarr", np.frombuffer(secret.encode() * 50, np.uint8), zarr_format=2)  # type: ignore[arg-type] # zarr's own stub
    page = base64.b64encode((tmp_path / "text.png").read_bytes()).decode()
    (tmp_path / "page.html").write_text(f'<img src="data:image/png;base64,{page}">')
    found = {name for name, content in contents(tmp_path) if secrets_in(content)}
    assert {"picture of text.png: texts", "note.parquet: metadata", "the values of a.zarr"} <= found
    assert "picture of exif.jpg: texts" in found
    assert "picture 0 of page.html: texts" in found
    (picture,) = [picture for _, picture in pictures("page.html", (tmp_path / "page.html").read_bytes())]
    assert has_color(picture, LABEL)
    shutil.rmtree(tmp_path / "a.zarr")
