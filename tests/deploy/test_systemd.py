"""The systemd units: read by systemd itself, and closed as far as they can be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY, debian_tool, output_of

UNITS = sorted((DEPLOY / "systemd").glob("*.*er*"))
SERVICES = [path for path in UNITS if path.suffix == ".service"]
VENV = "/srv/wsi-segment/venv/bin"


def installed(folder: Path) -> list[str]:
    """The units as they would be installed, with programs that exist."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("wsi-segment", "prefect"):
        (programs / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace(VENV, str(programs))
        (folder / unit.name).write_text(text, encoding="utf-8")
    return [str(folder / unit.name) for unit in UNITS]


def complaints(*units: str) -> str:
    # It exits 0 with some complaints and 1 with others: what it prints is what counts.
    program = debian_tool("systemd-analyze", "systemd")
    run = subprocess.run([program, "verify", "--man=no", *units], capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    assert {unit.name for unit in UNITS} == {
        "wsi-segment.service",
        "wsi-segment.timer",
        "wsi-segment-prefect-worker.service",
    }
    ours = [line for line in complaints(*installed(tmp_path)).splitlines() if "wsi-segment" in line]
    assert ours == []


def test_systemd_would_say_what_is_wrong(tmp_path: Path) -> None:
    installed(tmp_path)
    worse = tmp_path / "wsi-segment.service"
    worse.write_text(worse.read_text(encoding="utf-8").replace("ProtectHome=true", "ProtectHouse=true"))
    assert "ProtectHouse" in complaints(str(worse))


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.stem)
def test_service_is_closed(service: Path) -> None:
    # Of 100; an unprotected service has 96.
    program = debian_tool("systemd-analyze", "systemd")
    report = output_of(program, "security", "--offline=true", "--threshold=20", "--no-pager", str(service))
    assert "Overall exposure level" in report


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.stem)
def test_service_reads_the_settings_and_writes_results_only(service: Path) -> None:
    lines = service.read_text(encoding="utf-8").splitlines()
    assert "EnvironmentFile=/etc/wsi-segment/settings.env" in lines
    assert "ReadOnlyPaths=/srv/slides" in lines
    assert "ReadWritePaths=/srv/results" in lines
    assert "User=wsi" in lines


def test_timer_starts_the_service_of_its_name_every_day() -> None:
    (timer,) = [unit for unit in UNITS if unit.suffix == ".timer"]
    assert timer.with_suffix(".service") in SERVICES
    (when,) = re.findall(r"^OnCalendar=(.+)$", timer.read_text(encoding="utf-8"), re.MULTILINE)
    program = debian_tool("systemd-analyze", "systemd")
    assert "Normalized form: *-*-* 20:00:00" in output_of(program, "calendar", when)
