"""Write docs/cli.md from the commands: every argument and option with its default and its help, and the exit statuses.

    python -m tests.cli_docs [--check]

`--check` writes nothing and exits with status 1 if the page is not what this command writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperOption
from typer.main import get_command

from pipeline.cli import doctor, evaluate, export, familiarity, label, segment, train, view
from tests.repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "cli.md"

PROGRAMS: dict[str, typer.Typer] = {
    "wsi-segment": segment.app,
    "wsi-segment doctor": doctor.app,
    "wsi-view": view.app,
    "wsi-export": export.app,
    "wsi-label": label.app,
    "wsi-train": train.app,
    "wsi-evaluate": evaluate.app,
    "wsi-familiarity": familiarity.app,
}

HEAD = """# Commands

Every command prints this text with `--help`, and every program its version with `--version`. The page is generated: to
change a text, edit the command in `pipeline/cli/` and run `python -m tests.cli_docs`.
"""


def page() -> str:
    """Return the text of docs/cli.md."""
    return "\n".join([HEAD, *(line for name, app in PROGRAMS.items() for line in program_lines(name, app))])


def program_lines(name: str, app: typer.Typer) -> Iterator[str]:
    """Yield the lines about a program and its subcommands."""
    command = get_command(app)
    yield from command_lines(name, command, level=2)
    for subname, subcommand in getattr(command, "commands", {}).items():
        yield from command_lines(f"{name} {subname}", subcommand, level=3)


def command_lines(name: str, command: object, *, level: int) -> Iterator[str]:
    """Yield the lines about one command: its usage, its help, and a table of its arguments and options."""
    parameters = [one for one in getattr(command, "params", []) if not {"--help", "--version"} & set(one.opts)]
    arguments = [one for one in parameters if isinstance(one, TyperArgument)]
    usage = " ".join([name, *(f"{str(one.name).upper()}{'...' if one.nargs < 0 else ''}" for one in arguments)])
    if hasattr(command, "commands"):
        usage += " COMMAND"
    yield f"{'#' * level} {name}"
    yield ""
    yield f"    {usage}{' [OPTIONS]' if len(parameters) > len(arguments) else ''}"
    yield ""
    for paragraph in str(getattr(command, "help", "")).split("\n\n"):
        yield " ".join(paragraph.split())
        yield ""
    if parameters:
        yield "| option | values | default | what it does |"
        yield "|---|---|---|---|"
        yield from (parameter_line(one) for one in parameters)
        yield ""


def parameter_line(parameter: TyperArgument | TyperOption) -> str:
    """Return the row of one argument or option."""
    if isinstance(parameter, TyperArgument):
        names = str(parameter.name).upper()
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    cells = (names, values(parameter), default(parameter), str(parameter.help))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def values(parameter: TyperArgument | TyperOption) -> str:
    """Return which values an argument or option takes; nothing if it takes none."""
    if isinstance(parameter, TyperOption) and (parameter.is_flag or parameter.count):
        return ""
    kind: Any = parameter.type_descriptor.annotation
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    noun = {int: "integer", float: "number", Path: "path"}.get(kind, "text")
    if parameter.min is None:
        return noun
    return f"{noun}, {parameter.min:g} " + ("or more" if parameter.max is None else f"to {parameter.max:g}")


def default(parameter: TyperArgument | TyperOption) -> str:
    """Return what stands in the column of defaults: the text shown by `--help`, else the value."""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.required:
        return "required"
    if parameter.secondary_opts:
        chosen = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{chosen[0]}`"
    if (
        parameter.show_default is False
        or parameter.default in (None, False)
        or not isinstance(parameter.default, (str, int, float, Path))
    ):
        return ""
    return f"`{parameter.default}`"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it with `--check`; return the exit status."""
    text = page()
    if "--check" in arguments:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
