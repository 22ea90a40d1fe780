from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openslide
import pytest
from typer.testing import CliRunner

from pipeline.cli import doctor, segment
from tests.pipeline.pages.results import write_result
from tests.pipeline.small_bundle import small_bundle
from tests.repository import REPOSITORY


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle").path


def test_a_good_installation_is_one_screen_and_status_0(tmp_path: Path, bundle: Path) -> None:
    result = CliRunner().invoke(doctor.app, ["-m", str(bundle), "-o", str(tmp_path / "new" / "out")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "all good"
    assert [line.split()[0] for line in lines[:-1]] == [
        "program", "readers", "codecs", "processor", "devices", "model", "disk"
    ]  # fmt: skip
    assert f"openslide {openslide.__library_version__}" in lines[1]
    assert not (tmp_path / "new").exists()


def test_problems_are_named_and_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openslide, "__library_version__", "4.0.0")
    monkeypatch.setattr("pipeline.limits.available_memory", lambda: 1 << 30)
    result = CliRunner().invoke(doctor.app, ["-m", str(tmp_path / "no-model"), "-o", str(tmp_path), "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    vulnerable, memory, model = report["problems"]
    assert vulnerable.startswith(
        "OpenSlide 4.0.0 has a known vulnerability (CVE-2026-48977); install openslide-bin 4.0.1"
    )
    assert memory == "only 1.0 GiB of memory is available; a whole slide takes about 2"
    assert "neither a shipped model" in model
    assert report["readers"]["openslide"] == "4.0.0"
    assert report["codecs"]["JPEG8"] == "yes"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "because file is a file; choose another folder"),
        ("file/below/out", "because file is a file; choose another folder"),
        ("result", "is part of the result result; choose another folder"),
        ("n" * 300, "File name too long; choose another --output"),
    ],
)
def test_an_output_that_cannot_be_a_folder_is_a_problem(
    tmp_path: Path, bundle: Path, output: str, message: str
) -> None:
    (tmp_path / "file").touch()
    write_result(tmp_path, "result")
    result = CliRunner().invoke(doctor.app, ["-m", str(bundle), "-o", str(tmp_path / output)])
    assert result.exit_code == 1, result.output
    (problem,) = (line for line in result.stdout.splitlines() if line.startswith("problem"))
    assert problem.endswith(message)


def test_doctor_is_a_word_of_wsi_segment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["wsi-segment", "doctor", "--help"])
    with pytest.raises(SystemExit, match="0"):
        segment.main()
    assert "Print the versions of readers and codecs" in capsys.readouterr().out


def test_doctor_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pipeline.cli.doctor", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Print the versions of readers and codecs" in done.stdout


def test_the_default_model_is_that_of_the_command() -> None:
    assert doctor.DEFAULT_MODEL == segment.DEFAULT_MODEL
