"""Tests of the command as users run it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.view import app
from pipeline.web.server import is_news
from tests.repository import REPOSITORY
from tests.slides import painted, write_slide


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.view", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*arguments: str | Path) -> tuple[int, str]:
    """Return the exit status and stderr of a command that ends by itself."""
    with start(*arguments) as process:
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, errors


def test_it_serves_until_ctrl_c_and_prints_one_line_at_the_end(results_folder: Path) -> None:
    process = start(next(results_folder.glob("block*")), "--no-browser")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)  \(press Ctrl-C to stop\)\n", line)
    assert found is not None, line
    # Keep the connection open, as a browser does.
    with urllib.request.urlopen(found[1]) as answer:
        assert answer.status == 200
        assert answer.url.startswith(f"{found[1]}slides/")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "wsi-view: ended\n")


def test_requests_that_ctrl_c_interrupts_are_not_logged() -> None:
    def record(text: str, error: BaseException | None) -> logging.LogRecord:
        exc_info = None if error is None else (type(error), error, None)
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, text, (), exc_info)

    assert not is_news(record("Exception in ASGI application", asyncio.CancelledError("timeout")))
    assert not is_news(record("Cancel 2 running task(s), timeout graceful shutdown exceeded", None))
    assert is_news(record("Exception in ASGI application", ValueError("a fault")))


def test_another_slide_is_refused_before_the_server_starts(results_folder: Path, tmp_path: Path) -> None:
    other = write_slide(tmp_path / "block <1>.svs", painted((640, 416)), mpp=1.0)
    status, errors = ended(results_folder, "--slide", other, "--no-browser")
    assert status == 1
    assert errors.startswith("wsi-view: block <1>.svs: is not the slide that")


def test_a_result_whose_map_lacks_files_is_refused_before_the_server_starts(
    results_folder: Path, tmp_path: Path
) -> None:
    result = shutil.copytree(next(results_folder.glob("block*")), tmp_path / "a")
    chunk = min(path for path in result.glob("*.ome.zarr/0/*/*/*") if path.is_file())
    chunk.unlink()
    status, errors = ended(result, "--no-browser")
    assert status == 1
    missing = f"1 of its files are missing, such as {chunk.relative_to(result)}"
    assert errors.endswith(f": cannot be read: {missing}; segment the slide again with --repair\n")


def test_a_folder_that_cannot_be_examined_is_refused() -> None:
    done = CliRunner().invoke(app, ["n" * 300, "--annotator", "Ann", "--no-browser"])
    assert done.exit_code == 1
    assert done.stderr.endswith("n: cannot be read (File name too long); check the path and its permissions\n")


@pytest.mark.parametrize("several", [False, True])
def test_a_slide_that_cannot_be_examined_is_refused(results_folder: Path, tmp_path: Path, several: bool) -> None:
    for name in "ab" if several else "a":
        shutil.copytree(next(results_folder.glob("block*")), tmp_path / name)
    slide = tmp_path / ("n" * 300)
    done = CliRunner().invoke(app, [str(tmp_path), "--slide", str(slide), "--annotator", "Ann", "--no-browser"])
    assert done.exit_code == 1
    reason = "cannot be read (File name too long); check the path and its permissions"
    assert done.stderr == f"wsi-view: {slide}: {reason}\n"


def test_a_user_without_a_name_is_asked_for_one(results_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    done = CliRunner().invoke(app, [str(results_folder), "--no-browser"])
    assert done.exit_code == 2
    assert done.stderr == "wsi-view: this user has no user name; pass your name with --annotator\n"


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "message"), [(["none"], "no such folder"), ([str(REPOSITORY / "docs")], "contains no results")]
)
def test_a_path_without_a_result_is_refused(arguments: list[str], message: str) -> None:
    status, errors = ended(*arguments)
    assert status == 1
    assert re.fullmatch(f"wsi-view: .*{message}.*\n", errors)


def test_help_answers_at_once() -> None:
    begin = time.process_time()
    children = os.times().children_user
    process = start("--help")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert all(option in output for option in ("--slide", "--port", "--no-browser"))
    # Measure processor time, because a busy machine needs more wall-clock time.
    assert os.times().children_user - children + time.process_time() - begin < 0.5
