"""docs/cli.md is what the commands say, and every default that is written twice is the same."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from models.bundle import DEFAULT_BUNDLE
from pipeline.cli.segment import DEFAULT_MODEL
from pipeline.config import SegmentConfig
from tests.cli_docs import PAGE, PROGRAMS, main, page
from tests.repository import REPOSITORY


def test_docs_cli_is_what_the_commands_say() -> None:
    assert main(["--check"]) == 0, "run python -m tests.cli_docs"


def test_a_changed_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli_docs.page", lambda: page() + "| `--new` |  |  | A new option. |\n")
    assert main(["--check"]) == 1


def test_a_pair_of_options_has_the_name_of_its_default() -> None:
    assert "| `--tta`, `--no-tta` |  | `--no-tta` | " in page()


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_every_option_has_a_help_text_that_is_a_sentence(program: str) -> None:
    command = get_command(PROGRAMS[program])
    for one in list(getattr(command, "commands", {}).values()) or [command]:
        for parameter in one.params:
            if parameter.name != "help":
                assert re.fullmatch(r"\S.*\.", parameter.help, re.DOTALL), f"{program} {parameter.name}"


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_every_program_states_its_exit_statuses(program: str) -> None:
    assert re.search(r"Exit status: 0 [^.]*, 1 [^.]*, 2 usage error", get_command(PROGRAMS[program]).help or "")


def test_the_defaults_of_the_command_are_those_of_the_settings() -> None:
    defaults = SegmentConfig()
    names = {"min_area": "min_area_um2", "simplify": "simplify_px"}
    shared = 0
    for parameter in get_command(PROGRAMS["wsi-segment"]).params:
        setting = names.get(str(parameter.name), str(parameter.name))
        if hasattr(defaults, setting):
            # A flag that is not given has the default None or False.
            assert (parameter.default or None) == (getattr(defaults, setting) or None), setting
            shared += 1
    assert shared == 15
    assert DEFAULT_MODEL == DEFAULT_BUNDLE


def test_the_readme_links_the_page_and_repeats_no_option_table() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "(docs/cli.md)" in readme
    assert PAGE.is_file()
    assert not re.search(r"^\| `-", readme, re.MULTILINE)
