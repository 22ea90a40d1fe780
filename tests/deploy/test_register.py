"""deploy/register.sh with a stand-in for the program prefect."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY


def register(folder: Path, inspect: str, *options: str) -> tuple[int, str, list[str]]:
    """Run the script; return its status, its error output, and the commands that change the server.

    `inspect` are the lines of the stand-in for `prefect … inspect`.
    """
    program, commands = folder / "prefect", folder / "commands"
    program.write_text(
        f"""\
#!/bin/sh
case "$*" in
  *" inspect "*) {inspect} ;;
  *) echo "$*" >> {commands} ;;
esac
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    run = subprocess.run(
        ["bash", str(DEPLOY / "register.sh"), *options],
        env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return run.returncode, run.stderr, commands.read_text(encoding="utf-8").splitlines() if commands.exists() else []


@pytest.mark.parametrize("inspected", ["work-pool", "deployment", "automation"])
def test_what_cannot_be_inspected_is_not_registered_again(tmp_path: Path, inspected: str) -> None:
    lost = f'case "$2" in {inspected}) echo "httpx.ConnectError: All connection attempts failed" >&2; exit 1 ;; esac'
    assert register(tmp_path, lost) == (1, "httpx.ConnectError: All connection attempts failed\n", [])


def test_only_what_is_not_found_is_registered(tmp_path: Path) -> None:
    missing = 'case "$4" in train/training) echo "Deployment \'$4\' not found!"; exit 1 ;; esac'
    assert register(tmp_path, missing) == (0, "", ["--no-prompt deploy --name training"])


def test_nothing_is_registered_if_everything_exists(tmp_path: Path) -> None:
    assert register(tmp_path, "exit 0") == (0, "", [])


@pytest.mark.parametrize("options", [("--replace", "extra"), ("--force",), ("", "--replace")])
def test_other_arguments_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, error, commands = register(tmp_path, "exit 0", *options)
    assert (status, commands) == (2, [])
    assert error.startswith("usage: ")
