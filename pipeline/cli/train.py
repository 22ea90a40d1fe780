"""The command `wsi-train`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from typer.core import TyperCommand

from models.bundle import load_bundle
from pipeline.cli.commands import EXIT_INTERRUPTED, DeviceOption, QuietOption, fail, fail_with, run, version_option
from pipeline.console import printable_json
from pipeline.errors import TrainConfigError
from pipeline.files import local_path
from pipeline.training.presets import PRESETS, train_config
from wsi.errors import WsiSegmentError

PROGRAM = "wsi-train"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class _SeedsAsWords(TyperCommand):
    """Parse `--seeds 0 1 2` as one option, because a typer option accepts only one word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: typer has its own copy of click's Context
        return super().parse_args(ctx, with_seeds_joined(args))


@app.command(cls=_SeedsAsWords)
def train_command(
    dataset: Annotated[str, typer.Argument(help="Name of a shipped data set, a dataset.toml, or a folder with one.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder. An unfinished run in it is resumed.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the images.", show_default="the folder that the description names")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Training recipe: {', '.join(PRESETS)}.")] = "default",
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings that change the recipe.", show_default="none")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", help="One setting, as name=value. Can be repeated.", show_default="none"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Start from the weights of this model: a shipped model or a bundle folder. Classes are matched by "
            "name.",
            show_default="none",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Train once with each of these seeds, such as 0 1 2 or 0,1,2, in folders seed-N of the run folder, "
            "and print the mean and the spread of every score.",
            show_default="the setting seed alone",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings, class counts, steps, time and memory; train nothing.")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Measure the finished bundle on the test split, and store the scores in it.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log every step for TensorBoard too, in the folder tensorboard.")
    ] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Train a classifier and a segmenter from patch labels and write a model bundle for wsi-segment.

    For several GPUs, start the command with torchrun. To resume an interrupted run, give the same command again.

    Exit status: 0 done, 1 failed, 2 usage error, 130 interrupted.
    """
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(asctime)s %(message)s")

    try:
        local_path(output, "--output")
        train_config(preset, config, settings or ())  # before the libraries load, so that a typo is reported at once
        several = () if seeds is None else parse_seeds(seeds)
        start = None if init is None else load_bundle(init)
        from pipeline.training.dataset import load_dataset
        from pipeline.training.seeds import train_seeds
        from pipeline.training.start import start_settings
        from pipeline.training.train import train

        images = load_dataset(dataset, data)
        base = images.card.settings if start is None else start_settings(start.card, images.card.settings)
        chosen = train_config(preset, config, settings or (), base)
        if dry_run:
            from pipeline.training.dry_run import dry_run as plan

            typer.echo(printable_json(plan(images, chosen, device, start, max(1, len(several)))))
            return
        with training_bar(hidden=quiet or os.environ.get("RANK", "0") != "0") as progress:
            options: dict[str, Any] = {"device": device, "progress": progress, "test": test, "tensorboard": tensorboard}
            if several:
                result = train_seeds(images, output, chosen, several, **options, init=start)
            else:
                bundle = train(images, output, chosen, **options, init=start)
                result = {"bundle": str(bundle.path), "metrics": bundle.card.metrics}
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)
    except KeyboardInterrupt:
        # Not in the caller: typer would turn this into exit status 1.
        fail(
            PROGRAM,
            f"interrupted; run the same command again to resume from the last checkpoint in {output}",
            EXIT_INTERRUPTED,
        )
    if not quiet and os.environ.get("RANK", "0") == "0":  # torchrun starts several processes
        typer.echo(printable_json(result))


def with_seeds_joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with all numbers that follow --seeds joined into one word.

    A data set whose name is a number must therefore come before --seeds.
    """
    joined: list[str] = []
    after_seeds = False
    for position, word in enumerate(arguments):
        if word == "--":
            return [*joined, *arguments[position:]]
        is_seed = after_seeds and word.replace(",", "").isdecimal()
        if is_seed and joined[-1] != "--seeds":
            joined[-1] += f" {word}"
        else:
            joined.append(word)
        after_seeds = is_seed or word == "--seeds" or word.startswith("--seeds=")
    return joined


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of a list such as "0,1,2" or "0 1 2".

    Raises TrainConfigError unless there are at least two different numbers.
    """
    parts = text.replace(",", " ").split()
    # Python does not convert thousands of digits.
    seeds = [int(part) for part in parts if part.isdecimal() and len(part) < 20]
    if len(parts) < 2 or not len(parts) == len(seeds) == len(set(seeds)) or max(seeds) >= 2**63:
        raise TrainConfigError(
            f"--seeds is {text!r}; give at least two different numbers from 0 to 2**63 - 1, such as 0,1,2"
        )
    return tuple(seeds)


@contextmanager
def training_bar(*, hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per stage on stderr if it is a terminal; yield the callback that moves the bars."""
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
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
