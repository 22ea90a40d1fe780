"""The command `wsi-view`."""

from __future__ import annotations

# Heavy libraries are imported inside the command, so that `--help` answers at once.
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.commands import EXIT_USAGE, annotator_name, fail, run, version_option
from pipeline.console import log_to_stderr

if TYPE_CHECKING:
    from pipeline.viewing.viewer.results import Result

PROGRAM = "wsi-view"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def view(
    results: Annotated[Path, typer.Argument(help="Result of one slide, or a folder of results.")],
    slide: Annotated[
        Path | None,
        typer.Option(
            help="Slide of the result, or the folder that contains it, if the slide was moved.",
            show_default="the path in the result",
        ),
    ] = None,
    annotator: Annotated[
        str | None, typer.Option(help="Name of the person who corrects regions.", show_default="your user name")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the page.", min=0, max=65535, show_default="a free port")] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address of the page and do not open it.")
    ] = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Show results over their slides in the browser.

    The page is visible on this machine only. Press Ctrl-C to stop the server. Corrections of regions are saved in a
    file beside the result; nothing else is written.

    Exit status: 0 stopped by Ctrl-C, 1 the results or the slide cannot be shown, 2 usage error.
    """
    log_to_stderr(logging.WARNING)
    from pipeline.errors import ViewError
    from pipeline.viewing.viewer.app import make_app
    from pipeline.web.server import open_browser, serve

    def ready(url: str) -> None:
        typer.echo(f"{url}  (press Ctrl-C to stop)")
        if not no_browser:
            open_browser(url)

    try:
        serve(make_app(_found(results, slide), annotator_name(PROGRAM, annotator)), port, ready)
    except ViewError as error:
        fail(PROGRAM, str(error))
    typer.echo(f"{PROGRAM}: ended", err=True)


def _found(path: Path, slide: Path | None) -> tuple[Result, ...]:
    """Return the results to show. A single result and its slide are checked now, others when they are opened."""
    from pipeline.viewing.viewer.open_results import unavailable
    from pipeline.viewing.viewer.results import examined, find_results, with_slide
    from wsi.paths import kind_of

    results = find_results(path)
    if slide is not None:
        with examined(slide):
            is_folder = kind_of(slide) == "folder"
        if len(results) > 1 and not is_folder:
            fail(
                PROGRAM,
                f"{path} contains {len(results)} results; pass a folder with --slide, or name one result",
                EXIT_USAGE,
            )
        results = tuple(with_slide(result, slide) for result in results)
    if len(results) == 1 and (reason := unavailable(results[0])):
        fail(PROGRAM, reason)
    return results


def main() -> None:
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
