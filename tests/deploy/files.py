"""The folder deploy/ and the programs that check its files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # its stubs are a package of their own

from tests.repository import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
SETTINGS = DEPLOY / "settings" / "settings.env"


def env_file(path: Path) -> dict[str, str]:
    """Names and values of a file for docker compose, kustomize and systemd: NAME=value, and comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def documents(text: str) -> list[Any]:
    """What a YAML text holds, document by document."""
    return [one for one in yaml.safe_load_all(text) if one is not None]


def read_yaml(path: Path) -> Any:
    """What a YAML file of one document holds."""
    (only,) = documents(path.read_text(encoding="utf-8"))
    return only


def tool(name: str) -> str:
    """A program that pip installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not installed; pip install -e '.[test]' does that"
    return found


def debian_tool(name: str, package: str) -> str:
    """Return a program of the system. Skip the test if it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian's package {package} has it")
    return found


def output_of(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Return a program's output. Fail with the output if the program fails."""
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr
