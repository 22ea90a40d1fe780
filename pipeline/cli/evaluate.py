"""The command `wsi-evaluate`."""

from __future__ import annotations

# Heavy libraries are imported inside the command, so that `--help` answers at once.
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.commands import (
    EXIT_INTERRUPTED,
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    configure_logging,
    fail,
    fail_with,
    run,
    version_option,
)
from pipeline.console import printable_json

if TYPE_CHECKING:
    from rich.console import Console

    from models.predictor import Predictor
    from pipeline.training.dataset import Dataset
    from pipeline.training.dataset_sections import Split
    from pipeline.training.evaluate import Evaluation, Scores
    from pipeline.training.patch_scores import PatchResults, PatchScores

PROGRAM = "wsi-evaluate"
OUTPUTS = ("confusion.png", "worst.png", "evaluation.json")
"""Files of an evaluation; without masks, `confusion.png` is left out."""
GATES = {"gate_on": True, "gate_off": False}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="Name of a shipped model bundle, or path of a bundle.")],
    dataset: Annotated[str, typer.Argument(help="Name of a shipped data set, a dataset.toml, or a folder with one.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of the data.", show_default="the folder that the description names"),
    ] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Images to evaluate on.")] = "test",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("evaluation"),
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average over the eight flips and rotations.")] = False,
    worst: Annotated[int, typer.Option(help="Number of images in worst.png.", min=0, max=100)] = 8,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
    _version: Annotated[bool, version_option(PROGRAM)] = False,
) -> None:
    """Compare the maps of a model with the labels of a data set: patch labels and, if there are any, masks.

    Patch labels give recall, specificity and precision of each class, balanced accuracy, and the share of patches
    with every class right. A class counts as found in a patch if it covers more than a small share of the patch.

    If every image has a mask, the pixels give the IoU of each class, mean IoU, frequency-weighted IoU and accuracy, in
    two protocols. Protocol exclude ignores the pixels that the mask labels as white or as no class. Protocol include
    counts them as one more class; it needs a background rule in the dataset.toml, which predicts white.

    All scores are computed with and without the classification gate. The files evaluation.json, worst.png and, with
    masks, confusion.png replace those of an earlier evaluation in the output folder.

    Exit status: 0 done, 1 failed, 2 usage error, 130 interrupted.
    """
    configure_logging(verbose, quiet=quiet)
    from wsi.errors import WsiSegmentError

    try:
        predictor, chosen = _prepare(bundle, dataset, data, split, output, device, batch_size)
        with _bar(hidden=quiet) as progress:
            document = _evaluate(predictor, chosen, split, output, progress, tta=tta, worst=worst)
    except WsiSegmentError as error:
        fail_with(PROGRAM, error)
    except KeyboardInterrupt:
        # Not in the caller: typer would turn this into exit status 1.
        fail(PROGRAM, "interrupted; nothing was written", EXIT_INTERRUPTED)
    if as_json:
        typer.echo(printable_json(document))
    elif not quiet:
        _print_tables(document)


def _prepare(
    bundle: str, description: str, data: Path | None, split: Split, output: Path, device: str, batch_size: int | None
) -> tuple[Predictor, Dataset]:
    """Load the model and the description of the data set, and check both before the networks run."""
    from models.bundle import load_bundle
    from models.predictor import Predictor
    from pipeline.errors import OutputError
    from pipeline.files import local_path
    from pipeline.training.compose import composed
    from pipeline.training.dataset import load_dataset, samples
    from pipeline.training.evaluate import check_same_classes
    from pipeline.workers.malloc import keep_freed_memory

    keep_freed_memory()
    model, dataset = load_bundle(bundle), load_dataset(description, data)
    check_same_classes(model.card, dataset)
    if dataset.card.compose is None:
        samples(dataset, split)
    try:
        local_path(output, "--output").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output}: the folder cannot be created ({error.strerror}); choose another with -o"
        ) from error
    with _written(output), tempfile.TemporaryDirectory(prefix=".evaluation-", dir=output):
        pass  # a folder that cannot be written
    dataset = composed(dataset, output, (split,))
    # Training measures in the same way: the logits are enlarged to the model's pixels, not the probabilities.
    return Predictor.from_bundle(model, device=device, batch_size=batch_size, output_stride=1), dataset


def _evaluate(
    predictor: Predictor,
    dataset: Dataset,
    split: Split,
    output: Path,
    progress: Callable[[int, int], None],
    *,
    tta: bool,
    worst: int,
) -> dict[str, Any]:
    """Evaluate, write the files, and return the content of evaluation.json."""
    from pipeline.training.evaluate import evaluate as measure

    result = measure(predictor, dataset, split, flips=tta, progress=progress)
    document = _document(predictor, dataset, split, result, tta=tta)
    # The files are written elsewhere first, so a killed run leaves the files of the run before it.
    with _written(output), tempfile.TemporaryDirectory(prefix=".evaluation-", dir=output) as work:
        _draw(Path(work), predictor, dataset, split, result, tta=tta, worst=worst)
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        # Bytes of file names that are not text become JSON's own escapes.
        (Path(work) / "evaluation.json").write_text(text, encoding="utf-8", errors="backslashreplace")
        for name in OUTPUTS:
            new = Path(work) / name
            if new.exists():
                new.replace(output / name)
            else:
                (output / name).unlink(missing_ok=True)  # a matrix of an earlier evaluation, with masks
    return document


@contextmanager
def _written(output: Path) -> Iterator[None]:
    """Turn write errors into an OutputError that names the folder."""
    from pipeline.errors import OutputError

    try:
        yield
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another folder with -o") from error


def _document(predictor: Predictor, dataset: Dataset, split: Split, result: Evaluation, *, tta: bool) -> dict[str, Any]:
    """Return the result in plain values. Undefined scores are null. Without masks, all values of pixels are null."""
    from pipeline.results.record import versions

    return {
        "model": {"name": predictor.card.name, "digest": predictor.digest, "mpp": predictor.card.mpp},
        "dataset": {"name": dataset.card.name, "mpp": dataset.mpp, "split": split},
        "options": {"tta": tta, "device": predictor.device.type},
        "classes": list(result.names),
        "images": len(result.groups),
        "image_case": result.groups,
        "patches": _patches(result.patches),
        **_pixels(result),
        "versions": versions(),
    }


def _patches(results: PatchResults) -> dict[str, Any]:
    """Return the agreement with the presence labels."""
    balanced, exact = results.spread()
    return {
        "counted": results.count,
        "minimum_share": results.minimum,
        "with_class": results.patches,
        "scores": {name: _plain_patches(results.scores(gate=gate)) for name, gate in GATES.items()},
        "spread": {"balanced": _number(balanced), "exact": _number(exact)},
        "image_wrong": {name: results.wrong(name) for name in results.present},
    }


def _pixels(result: Evaluation) -> dict[str, Any]:
    """Return the scores of the pixels. Without masks, each value is None."""
    if not result.matrices:
        return dict.fromkeys(("pixels", "scores", "miou_spread", "confusion", "image_confusion", "image_miou"))
    matrix = result.matrices["exclude", True]
    return {
        "pixels": {"counted": int(matrix[:-1].sum()), "white": int(matrix[-1].sum())},
        "scores": {
            protocol: {name: _plain(result.scores(protocol, gate=gate)) for name, gate in GATES.items()}
            for protocol in result.protocols
        },
        "miou_spread": _number(result.miou_spread()),
        "confusion": {
            protocol: {name: result.matrices[protocol, gate].tolist() for name, gate in GATES.items()}
            for protocol in result.protocols
        },
        "image_confusion": {name: matrix.tolist() for name, matrix in result.image_matrices.items()},
        "image_miou": {name: _number(value) for name, value in result.image_miou.items()},
    }


def _plain_patches(scores: PatchScores) -> dict[str, Any]:
    by_class = {"recall": scores.recall, "specificity": scores.specificity, "precision": scores.precision}
    plain: dict[str, Any] = {
        key: {name: _number(value) for name, value in of_class.items()} for key, of_class in by_class.items()
    }
    return plain | {"balanced": _number(scores.balanced), "exact": scores.exact}


def _plain(scores: Scores) -> dict[str, Any]:
    return {
        "iou": {name: _number(value) for name, value in scores.iou.items()},
        "miou": _number(scores.miou),
        "fwiou": _number(scores.fwiou),
        "accuracy": _number(scores.accuracy),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _draw(
    folder: Path,
    predictor: Predictor,
    dataset: Dataset,
    split: Split,
    result: Evaluation,
    *,
    tta: bool,
    worst: int,
) -> None:
    """Draw confusion.png (protocol exclude, gate on; only with masks) and worst.png."""
    from pipeline.training.dataset import read_mask, read_rgb, samples
    from pipeline.training.evaluate import predict_image
    from pipeline.training.pictures import Compared, write_comparison, write_confusion_matrix

    if result.matrices:
        title = f"{predictor.card.name} on {dataset.card.name}, {split}"
        matrix = result.matrices["exclude", True][:-1]
        write_confusion_matrix(folder / "confusion.png", matrix, result.names, [*result.names, "no class"], title)
    by_name = {sample.name: sample for sample in samples(dataset, split)}

    def compared() -> Iterator[Compared]:
        for name, title in _ranked(result)[:worst]:
            rgb_HWC = read_rgb(by_name[name])
            truth_HW = read_mask(dataset, by_name[name]) if result.matrices else None
            labels_HW = predict_image(predictor, rgb_HWC, mpp=dataset.mpp, flips=tta)
            yield Compared(title, rgb_HWC, truth_HW, labels_HW)

    write_comparison(folder / "worst.png", compared(), dataset.classes)


def _ranked(result: Evaluation) -> list[tuple[str, str]]:
    """Return the names of the images, the worst first, with their titles in worst.png.

    Without masks, images with every class right are left out, because they cannot be ranked.
    """
    if result.matrices:
        ranked = sorted((miou, name) for name, miou in result.image_miou.items() if not math.isnan(miou))
        return [(name, f"{name}: mIoU {100 * miou:.1f} %") for miou, name in ranked]
    patches, titles = result.patches, []
    for name in sorted(patches.present, key=lambda name: (-patches.wrong(name), name)):
        found, missed = patches.mistakes(name)
        parts = [
            f"{what} {', '.join(names)}" for what, names in (("wrongly found", found), ("missed", missed)) if names
        ]
        if parts:
            titles.append((name, f"{name}: {'; '.join(parts)}"))
    return titles


def _print_tables(document: dict[str, Any]) -> None:
    """Print the scores of patches and, with masks, those of pixels, in percent."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{document['model']['name']} on {document['dataset']['name']}, {document['dataset']['split']}"))
    patches = document["patches"]
    on, off = (patches["scores"][gate] for gate in GATES)
    table = Table(title=Text(f"{_counted(patches['counted'], 'labeled patch', 'labeled patches')}, gate on, %"))
    table.add_column("class")
    for column in ("patches", "recall", "specificity", "precision"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, count in patches["with_class"].items():
        cells = [_cell(on[key][name]) for key in ("recall", "specificity", "precision")]
        table.add_row(Text(name), str(count), *cells)
    console.print(table)
    for label, key in (("balanced accuracy", "balanced"), ("patches with every class right", "exact")):
        console.print(Text(f"{label}: {_with_spread(on[key], patches['spread'][key])}, gate off {_percent(off[key])}"))
    if document["scores"] is None:
        console.print("no scores of pixels, because they require a mask of every image")
    else:
        _print_pixels(console, document)
    if len(set(document["image_case"].values())) == 1:
        console.print("no ±, because all images belong to one case")
    else:
        console.print("±: standard deviation over test sets of as many cases")


def _print_pixels(console: Console, document: dict[str, Any]) -> None:
    """Print a table with one column per protocol and gate and one row per score, and the mIoU with its spread."""
    from rich.table import Table
    from rich.text import Text

    columns = [document["scores"][protocol][gate] for protocol in document["scores"] for gate in GATES]
    table = Table(title=Text(f"pixels of {_counted(document['images'], 'image', 'images')}, %"))
    table.add_column("")
    for protocol in document["scores"]:
        for gate in ("gate on", "gate off"):
            table.add_column(f"{protocol}\n{gate}", justify="right", no_wrap=True)
    names = list(columns[-1]["iou"])
    for name in names:
        last = name == names[-1]
        table.add_row(Text(f"IoU {name}"), *(_cell(c["iou"].get(name)) for c in columns), end_section=last)
    for label, key in (("mIoU", "miou"), ("FwIoU", "fwiou"), ("ACC", "accuracy")):
        table.add_row(label, *(_cell(column[key]) for column in columns))
    console.print(table)
    miou = document["scores"]["exclude"]["gate_on"]["miou"]
    console.print(Text(f"mIoU (exclude, gate on): {_with_spread(miou, document['miou_spread'])}"))


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _with_spread(value: float | None, spread: float | None) -> str:
    return _percent(value) if spread is None else f"{_cell(value)} ± {_cell(spread)} %"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{_cell(value)} %"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


@contextmanager
def _bar(*, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of images on stderr if it is a terminal; yield the callback that moves the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bars:
        task = bars.add_task("images", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def main() -> None:
    """Run the console script."""
    run(app)


if __name__ == "__main__":
    main()
