"""The command `wsi-export`: write results for other programs, and check that these programs can read them."""

from __future__ import annotations

# Heavy libraries are imported inside the commands, so that `--help` answers at once.
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.commands import EXIT_FAILED, fail_with, run, version_option
from pipeline.console import log_to_stderr, printable

PROGRAM = "wsi-export"

SHOWN = 20
"""Findings printed for one file. Further findings are counted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def export(_version: Annotated[bool, version_option(PROGRAM)] = False) -> None:
    """Write results for other programs, and check that these programs can read them.

    Exit status: 0 done, 1 failed or the check found an error, 2 usage error.
    """
    log_to_stderr(logging.WARNING)


@app.command()
def qupath(
    results: Annotated[
        Path, typer.Argument(help="Folder that was given to wsi-segment with --output.", show_default=False)
    ],
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Also write tiles whose measurements are the probabilities of the classes.")
    ] = False,
    slides: Annotated[
        Path | None, typer.Option("--slides", help="Folder to search for slides that were moved.", show_default="none")
    ] = None,
) -> None:
    """Write a QuPath project of all results to RESULTS/qupath, or update an existing one.

    Close the project in QuPath first. Your own changes to the project are kept.
    """
    from pipeline.viewing.qupath.project import write_project
    from wsi.errors import WsiSegmentError

    try:
        typer.echo(printable(str(write_project(results, tiles=tiles, slides=slides))))
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)


@app.command()
def check(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of results, results of one slide, .ome.zarr folders or .geojson files.", show_default=False
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only files with errors.")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Of results, check only summary.csv and that all files exist and have the recorded size."
        ),
    ] = False,
) -> None:
    """Check results against their digests, and their files against what QuPath, napari and Vitessce can read."""
    from pipeline.checks.result import broken_rules
    from wsi.errors import WsiSegmentError

    try:
        found = [item for path in paths for item in broken_rules(path, quick=quick).items()]
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)
    for path, wrong in found:
        if wrong or not quiet:
            typer.echo(f"{'wrong' if wrong else 'good '} {printable(str(path))}")
        for text in wrong[:SHOWN]:
            typer.echo(f"      {printable(text)}")
        if len(wrong) > SHOWN:
            typer.echo(f"      and {len(wrong) - SHOWN} more")
    if any(wrong for _, wrong in found):
        sys.exit(EXIT_FAILED)


def main() -> None:
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
