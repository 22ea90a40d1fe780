"""The command `wsi-train`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pipeline.cli.commands import EXIT_INTERRUPTED, fail, run
from pipeline.training.config import PRESETS, train_config
from wsi.errors import WsiSegmentError

PROGRAM = "wsi-train"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def train_command(
    dataset: Annotated[str, typer.Argument(help="A dataset.toml, or the name of a shipped one.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder; an unfinished run in it goes on.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the images; wins over the one the TOML names.")] = None,
    preset: Annotated[str, typer.Option(help=f"Recipe: {', '.join(PRESETS)}.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file of settings that change the recipe.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="One setting, name=value. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
) -> None:
    """Train a classifier and a segmenter from patch labels and write a model bundle for wsi-segment.

    Start it with torchrun for several GPUs. A run that was killed goes on when the same command is given again.
    """
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(message)s")

    try:
        chosen = train_config(preset, config, settings or ())
        from pipeline.training.dataset import load_dataset
        from pipeline.training.train import train

        with training_bar(hidden=quiet or os.environ.get("RANK", "0") != "0") as progress:
            bundle = train(load_dataset(dataset, data), output, chosen, device=device, progress=progress)
    except WsiSegmentError as error:
        fail(PROGRAM, str(error))
    except KeyboardInterrupt:
        # Here and not in the caller: typer would make exit status 1 of it.
        fail(PROGRAM, f"interrupted; the same command goes on from the last checkpoint in {output}", EXIT_INTERRUPTED)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        typer.echo(json.dumps({"bundle": str(bundle.path), "metrics": bundle.card.metrics}, indent=2))


@contextmanager
def training_bar(*, hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per stage on stderr where that is a terminal; yields the callback that moves them."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=console, disable=hidden or not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield update


def main() -> None:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
