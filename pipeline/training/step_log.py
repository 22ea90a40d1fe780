"""The log of single training steps: one callback, which writes a CSV file and, on request, TensorBoard events.

Every step has its loss, the learning rate of new weights, the norm of the gradient before clipping, and mu, the
threshold of progressive dropout attention, if it is applied.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.errors import TrainConfigError


class Step(NamedTuple):
    """One step of a stage."""

    stage: str
    step: int
    """1-based."""
    epoch: int
    """1-based."""
    values: dict[str, float]
    """By the names of `VALUES`; "mu" only if the attention is applied."""


StepLog = Callable[[Step], None]

VALUES = ("loss", "rate", "gradient_norm", "mu")


@contextmanager
def open_step_log(run: Path, *, tensorboard: bool = False) -> Iterator[StepLog]:
    """Yield the callback that logs every step to <run>/<stage>.steps.csv, and with `tensorboard` to <run>/tensorboard.

    Steps that a killed run logged after its last checkpoint are replaced by those of the resumed run. Raises
    TrainConfigError if TensorBoard is not installed.
    """
    with ExitStack() as opened:
        logs: list[StepLog] = [opened.enter_context(_csv_log(run))]
        if tensorboard:
            logs.append(opened.enter_context(_tensorboard_log(run / "tensorboard")))

        def log(step: Step) -> None:
            for one in logs:
                one(step)

        yield log


@contextmanager
def _csv_log(run: Path) -> Iterator[StepLog]:
    with ExitStack() as opened:
        files: dict[str, IO[str]] = {}

        def log(step: Step) -> None:
            if step.stage not in files:
                files[step.stage] = opened.enter_context(_continued(run / f"{step.stage}.steps.csv", step.step))
            values = [format(step.values[name], ".6g") if name in step.values else "" for name in VALUES]
            csv.writer(files[step.stage]).writerow([step.step, step.epoch, *values])

        yield log


def _continued(file: Path, first: int) -> IO[str]:
    """Return the file, open for step `first`: with the rows of earlier steps, and without incomplete or later ones."""
    header = ["step", "epoch", *VALUES]
    kept = []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.reader(stream) if len(row) == len(header) and row[0].isdigit()]
        kept = [row for row in rows if int(row[0]) < first]
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *kept])
    temporary.replace(file)
    # One line at a time, so that a run can be watched.
    return file.open("a", newline="", encoding="utf-8", buffering=1)


@contextmanager
def _tensorboard_log(folder: Path) -> Iterator[StepLog]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainConfigError(
            "--tensorboard needs TensorBoard: pip install tensorboard, or omit the option"
        ) from error
    with ExitStack() as opened:
        writers: dict[str, Any] = {}

        def log(step: Step) -> None:
            if step.stage not in writers:
                # Events of a killed run from this step on are hidden.
                writer: Any = SummaryWriter(str(folder / step.stage), purge_step=step.step)
                opened.callback(writer.close)
                writers[step.stage] = writer
            for name, value in step.values.items():
                writers[step.stage].add_scalar(name, value, step.step)

        yield log
