"""Scripts of deploy/, and the commands that its files and docs/operations.md give to people."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from tests.deploy.files import DEPLOY, debian_tool, output_of, tool
from tests.repository import REPOSITORY

OPERATIONS = REPOSITORY / "docs" / "operations.md"
PAGES = [*sorted(DEPLOY.rglob("*.md")), OPERATIONS]
SHELL = sorted(DEPLOY.rglob("*.sh"))
SLURM = DEPLOY / "slurm" / "segment_on_slurm.py"
TEXTS = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and "__pycache__" not in path.parts] + [
    OPERATIONS
]


def options_of_wsi_segment() -> set[str]:
    command = get_command(importlib.import_module("pipeline.cli.segment").app)
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


def used_options(*words: str) -> dict[str, Path]:
    """Return the options that follow a command in deploy/ and docs/operations.md, each with one file that uses it."""
    found: dict[str, Path] = {}
    for path in TEXTS:
        for call in calls(path.read_text(encoding="utf-8"), *words):
            found |= {word.partition("=")[0]: path for word in call if re.match(r"--?[a-z]", word)}
    return found


def calls(text: str, *words: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of a command, up to the end of its line. A call may be a list in YAML."""
    text = re.sub(r",\s*\n\s*", " ", text.replace("\\\n", " "))
    for line in re.sub(r"[\[\],\"']", " ", text.replace("`", " | ").replace("--no-prompt", "")).splitlines():
        parts = line.split()
        for start in range(len(parts)):
            end = start + len(words)
            # Behind -n it is a namespace of Kubernetes.
            if [parts[start].rpartition("/")[2], *parts[start + 1 : end]] == [*words] and parts[start - 1] != "-n":
                yield list(itertools.takewhile(lambda word: word not in ("|", "||", "&&", ";", "#"), parts[end:]))


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_script_parses_and_shellcheck_finds_nothing(script: Path) -> None:
    assert output_of("bash", "-n", str(script)) == ""
    assert output_of(debian_tool("shellcheck", "shellcheck"), str(script)) == ""
    assert script.stat().st_mode & 0o111


def test_options_given_to_wsi_segment_exist() -> None:
    used = used_options("wsi-segment")
    assert {"--recursive", "--output", "--quiet", "--dry-run", "--num-workers"} <= used.keys()
    assert used.keys() <= options_of_wsi_segment()


@pytest.mark.full
def test_options_given_to_prefect_exist() -> None:
    least = {
        "worker start": {"--pool", "--type", "--limit", "--with-healthcheck"},
        "server start": {"--host"},
        "deployment run": {"--param"},
        "work-pool create": {"--type"},
        "automation create": {"--from-file"},
    }
    others = ["work-pool inspect", "work-pool pause", "work-pool resume", "automation inspect", "flow-run cancel",
              "deploy", "deployment inspect", "deployment schedule ls", "deployment schedule pause"]  # fmt: skip
    helps = prefect_helps([*least, *others])
    for command, text in helps.items():
        used = used_options("prefect", *command.split())
        assert least.get(command, set()) <= used.keys()
        for option, path in used.items():
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{path}: prefect {command} has no {option}"
    groups = {"worker", "server", "deployment", "work-pool", "automation", "flow-run"}
    called = {
        " ".join(call[:2]) for path in TEXTS for call in calls(path.read_text(encoding="utf-8"), "prefect") if call
    }
    assert {one for one in called if one.split()[0] in groups} <= {" ".join(name.split()[:2]) for name in helps}


def prefect_helps(commands: list[str]) -> dict[str, str]:
    """What `prefect COMMAND --help` prints, of all commands by one process: Prefect takes seconds to start."""
    code = """
import contextlib, io, json, sys, prefect.cli
helps = {}
for command in sys.argv[1:]:
    sys.argv = ["prefect", *command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        prefect.cli.app()
    helps[command] = out.getvalue()
print(json.dumps(helps))
"""
    helps: dict[str, str] = json.loads(output_of(sys.executable, "-c", code, *commands))
    assert all("Usage: prefect " + command in text for command, text in helps.items())
    return helps


@pytest.mark.parametrize(("role", "least"), [("scheduler", {"--port"}), ("worker", {"--nthreads", "--memory-limit"})])
def test_options_given_to_dask_exist(role: str, least: set[str]) -> None:
    used = used_options("dask", role)
    assert least <= used.keys()
    text = output_of(tool("dask"), role, "--help")
    for option, path in used.items():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{path}: dask {role} has no {option}"


def test_options_given_to_the_slurm_script_exist() -> None:
    used = used_options("segment_on_slurm.py").keys()
    assert "--jobs" in used
    offered = set(re.findall(r"--[a-z-]+", output_of(sys.executable, str(SLURM), "--help")))
    assert used <= offered | options_of_wsi_segment()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_folder_explains_its_use() -> None:
    folders = {path for path in DEPLOY.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {path.parent for path in PAGES} >= folders
    top = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert all(f"({folder.name}/README.md)" in top for folder in folders)


def test_messages_that_operations_explains_are_those_of_the_code() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    table = text[text.index("| message |") :].partition("\n\n")[0].splitlines()[2:]
    sources = [
        path.read_text(encoding="utf-8")
        for package in ("wsi", "pipeline")
        for path in (REPOSITORY / package).rglob("*.py")
    ]
    # Strings that are written in pieces, put together.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    parts = [part.strip() for row in table for part in re.split(r"[…;]", row.split("|")[1])]
    assert len(parts) > 9
    assert [part for part in parts if part and part not in code] == []
