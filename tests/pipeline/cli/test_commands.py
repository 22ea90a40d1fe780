"""What all console commands share."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import IO

import pytest

from pipeline.cli.commands import annotator_name, run
from tests.repository import REPOSITORY

SCRIPTS: dict[str, str] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "scripts"
]

SPACE = "free some space and run the same command again, or choose another place"


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, in the repository."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=REPOSITORY
    )


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        ("ENOSPC", None, f"output: cannot be written: No space left on device; {SPACE}"),
        ("ENOSPC", "run/a.csv", f"run/a.csv: cannot be written: No space left on device; {SPACE}"),
        (
            "EIO",
            "a.png",
            "a.png: cannot be read or written: Input/output error; check the disk, then run the same command again",
        ),
        ("EDQUOT", None, f"output: cannot be written: Disk quota exceeded; {SPACE}"),
    ],
)
def test_a_command_that_a_full_disk_ends_does_not_call_its_results_complete(
    number: str, file: str | None, said: str
) -> None:
    code = (
        "import errno, os\n"
        "from pipeline.cli.commands import run\n"
        "def app():\n"
        f"    raise OSError(errno.{number}, os.strerror(errno.{number}), {file!r})\n"
        "run(app)\n"
    )
    done = run_code(code)
    assert done.returncode == 1
    assert done.stderr == said + "\n"


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "after"),
    [((100, 300), (300, 300)), ((100, 20_000), (10_240, 20_000)), ((15_000, 20_000), (15_000, 20_000))],
)
def test_a_command_may_open_as_many_files_as_its_user_may(before: tuple[int, int], after: tuple[int, int]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != most < before[1]:
        pytest.skip(f"this machine allows {most} open files")
    code = (
        "import resource\n"
        "from pipeline.cli.commands import run\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, {before})\n"
        "run(lambda: print(resource.getrlimit(resource.RLIMIT_NOFILE)))\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout) == (0, f"{after}\n"), done.stderr


@pytest.mark.full
def test_windows_is_refused_before_the_command_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        run(lambda: started.append("app"))
    assert (ended.value.code, started) == (1, [])
    assert capsys.readouterr() == ("", "wsi-segment: needs Linux or macOS; on Windows, use WSL\n")


@pytest.mark.full
@pytest.mark.parametrize("modules", [(), ("fcntl", "resource")], ids=["macOS", "Windows"])
def test_every_command_loads_without_what_another_system_lacks(modules: tuple[str, ...]) -> None:
    scripts = sorted({script.partition(":")[0] for script in SCRIPTS.values()})
    code = (
        "import errno, sys\n"
        "from importlib import import_module\n"
        "import filelock, psutil  # on those systems, they do not use what is missing\n"
        "del errno.EREMOTEIO\n"
        f"sys.modules.update(dict.fromkeys({modules}))\n"
        f"for name in {scripts}: import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, cwd=REPOSITORY
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.full
@pytest.mark.parametrize("error", [ValueError("not allowed to raise maximum limit"), PermissionError()])
def test_a_command_runs_if_the_system_refuses_another_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        asked.append(True)
        raise error

    asked: list[bool] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1_000_000_000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    ran: list[bool] = []
    run(lambda: ran.append(True))
    assert (asked, ran) == ([True], [True])


@pytest.mark.full
def test_an_annotator_whose_name_is_not_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert annotator_name("wsi-view", "Jürgen") == "Jürgen"
    monkeypatch.setattr("getpass.getuser", lambda: "J\udcfcrgen")  # Latin-1, as Python reads it
    for given in (None, "J\udcfcrgen"):
        with pytest.raises(SystemExit, match=r"^2$"):
            annotator_name("wsi-view", given)
        message = "wsi-view: the name 'J\\udcfcrgen' is not valid UTF-8; pass another --annotator\n"
        assert capsys.readouterr().err == message


@pytest.mark.full
@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("line", [*SCRIPTS, "wsi-segment doctor"])
def test_a_closed_or_full_output_ends_every_command_without_a_traceback(line: str, option: str) -> None:
    name, *words = line.split()
    module, _, function = SCRIPTS[name].partition(":")
    code = f"from {module} import {function}; {function}()"

    def errors_of(output: IO[bytes]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *words, option],
            stdout=output,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
            cwd=REPOSITORY,
        )
        assert done.returncode == 1
        return done.stderr.decode()

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        assert errors_of(closed) == ""
    if Path("/dev/full").exists():  # Linux
        with Path("/dev/full").open("wb") as full:
            assert errors_of(full) == f"output: cannot be written: No space left on device; {SPACE}\n"


@pytest.mark.parametrize("line", [*SCRIPTS, "wsi-segment doctor"])
def test_every_command_prints_its_version(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    module, _, function = SCRIPTS[words[0]].partition(":")
    monkeypatch.setattr("sys.argv", [*words, "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        getattr(import_module(module), function)()
    assert capsys.readouterr() == (f"{line} {version('wsi-segment')}\n", "")


def test_no_heavy_library_is_loaded_to_print_a_version() -> None:
    code = (
        "import importlib, sys\n"
        "for script in sys.argv[1:]:\n"
        "    module, _, function = script.partition(':')\n"
        "    sys.argv = ['a', '--version']\n"
        "    try:\n"
        "        getattr(importlib.import_module(module), function)()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *SCRIPTS.values()], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    *versions, modules = done.stdout.splitlines()
    assert len(versions) == len(SCRIPTS)
    assert "typer" in modules.split()
    assert not {"torch", "openvino", "timm", "distributed", "prefect"} & set(modules.split())
