"""Attacks on the promise: whatever a slide is called, tables, JSON, logs and terminals stay what they are."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.batch.collect import collect_jobs
from pipeline.batch.queue import run_batch
from pipeline.checks.result import broken_rules
from pipeline.progress import no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.results.summary import read_summary, write_summary
from pipeline.workers.in_process import InProcess
from tests.full.program import program
from tests.pipeline.fakes import SMALL, color_predictor
from tests.repository import REPOSITORY
from tests.slides import small_slide

FORMULAS = ("=1+1", "+cmd", "-2", "@SUM(A1)", "'=already", "\tx")


def test_names_of_formulas_are_texts_for_spreadsheets_and_themselves_for_us(tmp_path: Path) -> None:
    write_summary(tmp_path, [SlideResult(name, "failed", 0.0, error="=HYPERLINK(1)") for name in FORMULAS])
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file))[1:]
    assert sorted(row[0] for row in cells) == sorted(f"'{name}" for name in FORMULAS)
    assert all(not cell.startswith(("=", "+", "-", "@", "\t")) for row in cells for cell in row)
    assert set(read_summary(tmp_path / "summary.csv")) == set(FORMULAS)
    write_summary(tmp_path, [])
    assert set(read_summary(tmp_path / "summary.csv")) == set(FORMULAS)


def test_the_columns_have_a_fixed_order_whatever_was_there_first(tmp_path: Path) -> None:
    first = SlideResult("a", "done", 1.0, {"z": 1.0, "b": 2.0})
    second = SlideResult("b", "done", 1.0, {"a": 1.0})
    for number, results in enumerate(([first, second], [second, first])):
        (tmp_path / str(number)).mkdir()
        for result in results:
            write_summary(tmp_path / str(number), [result])
    tables = [(tmp_path / str(number) / "summary.csv").read_text() for number in range(2)]
    assert tables[0] == tables[1]
    header = tables[0].splitlines()[0].split(",")
    areas = ["area_mm2 a", "area_mm2 b", "area_mm2 z"]
    assert header[:3] == ["slide", "status", "seconds"]
    assert header[-6:] == [*areas, "resumed_blocks", "warnings", "error"]


NAMES = (b"\x1b]0;owned\x07.svs", b"a\nERROR: forged.svs", b"\xff\xfe.svs", b"\xe2\x80\xaegpj.svs", b"=1+1.svs")


def test_names_with_control_characters_and_other_bytes_are_segmented_and_checked(tmp_path: Path) -> None:
    for name in NAMES:
        small_slide(tmp_path / "slides.svs").rename(tmp_path / os.fsdecode(name))
    workers = InProcess(lambda _: color_predictor(), "model", SMALL)
    output = tmp_path / "out"
    results = run_batch(collect_jobs([tmp_path]), output, workers, lambda _: no_progress, lambda _: None)
    assert [r.status for r in results] == ["done"] * len(NAMES)
    assert [wrong for wrong in broken_rules(output).values() if wrong] == []


def test_control_characters_never_reach_a_terminal_or_a_log(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(b"no slide")
    for arguments in (["--json"], ["-vv", "--retry-failed"], ["--dry-run"], ["--dry-run", "--json"]):
        done = program(".", "-o", "out", *arguments, folder=tmp_path, capture_output=True)
        assert done.returncode == 1
        for stream in (done.stdout, done.stderr):
            text = stream.decode("utf-8")
            assert not {"\x1b", "\x07", "\u202e"} & set(text), arguments
            assert "\nERROR: forged" not in text
        if "--json" in arguments:
            assert len(json.loads(done.stdout)) == len(NAMES)


def test_a_closed_or_full_output_ends_quietly(tmp_path: Path) -> None:
    for number in range(3):
        small_slide(tmp_path / f"{number}.svs")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = program(".", "--dry-run", folder=tmp_path, stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as full:
            done = program(".", "--dry-run", folder=tmp_path, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == (
            b"output: cannot be written: No space left on device; free some space and run the same command "
            b"again, or choose another place\n"
        )


def test_closed_standard_files_never_lend_their_numbers_to_results(tmp_path: Path) -> None:
    code = (
        "import os\nfor number in range(3): os.close(number)\n"
        "from pipeline.cli.commands import run\n"
        "def app():\n"
        "    file = open('result', 'wb')\n"
        "    os.write(1, b'printed by a library'); os.write(2, b'and its errors')\n"
        "    file.write(b'pixels'); file.close(); open('number', 'w').write(str(file.fileno) and 'ok')\n"
        "run(app)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False
    )
    assert (tmp_path / "result").read_bytes() == b"pixels"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_named_slide_that_failed_before_is_status_1_and_a_folder_of_it_0(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").write_bytes(b"no slide")
    assert program("slides/a.svs", "-o", "out", *options, folder=tmp_path, capture_output=True).returncode == 1
    assert program("slides/a.svs", "-o", "out", *options, folder=tmp_path, capture_output=True).returncode == 1
    assert program("slides", "-o", "out", *options, folder=tmp_path, capture_output=True).returncode == 0
