"""The command wsi-segment, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from pipeline.cli.segment import app


def invoke(*arguments: str) -> Result:
    """Return the exit status and the outputs of the command. With the fixture `fake` it uses known networks."""
    return CliRunner().invoke(app, list(arguments))
