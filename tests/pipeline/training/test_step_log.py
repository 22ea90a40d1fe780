from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.errors import TrainConfigError
from pipeline.training import fit as loop
from pipeline.training.fit import fit, rate_factor
from pipeline.training.step_log import Step, open_step_log
from tests.pipeline.training.line import CONFIG, CPU, line_task


def rows_of(folder: Path, stage: str = "line") -> list[dict[str, str]]:
    with (folder / f"{stage}.steps.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_step_has_its_loss_rate_and_gradient_norm(tmp_path: Path) -> None:
    task = line_task(epochs=2, steps=3)
    with open_step_log(tmp_path) as log:
        fit(task, tmp_path, CONFIG, CPU, log=log)
    rows = rows_of(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [
        ("1", "1"),
        ("2", "1"),
        ("3", "1"),
        ("4", "2"),
        ("5", "2"),
        ("6", "2"),
    ]
    assert [float(row["rate"]) for row in rows] == pytest.approx(
        [CONFIG.new_rate * rate_factor(CONFIG, step, 6) for step in range(6)], rel=1e-5
    )
    assert all(float(row["gradient_norm"]) > 0 and row["mu"] == "" for row in rows)
    with (tmp_path / "line.csv").open() as stream:
        epochs = list(csv.DictReader(stream))
    means = [sum(float(row["loss"]) for row in rows[n : n + 3]) / 3 for n in (0, 3)]
    assert [float(row["loss"]) for row in epochs] == pytest.approx(means, rel=1e-5)


def test_a_resumed_run_replaces_the_steps_after_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 1e9)  # at the end of an epoch only
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    with open_step_log(tmp_path / "whole") as log:
        fit(line_task(), tmp_path / "whole", CONFIG, CPU, log=log)

    def kill(_what: str, done: int, _total: int) -> None:
        if done == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError), open_step_log(tmp_path / "broken") as log:
        fit(line_task(), tmp_path / "broken", CONFIG, CPU, log=log, progress=kill)
    assert len(rows_of(tmp_path / "broken")) == 6
    with (tmp_path / "broken" / "line.steps.csv").open("a") as stream:
        stream.write("7,2,0.")  # a killed process
    with open_step_log(tmp_path / "broken") as log:
        fit(line_task(), tmp_path / "broken", CONFIG, CPU, log=log)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")


def test_the_log_has_mu_if_the_attention_is_applied(tmp_path: Path) -> None:
    with open_step_log(tmp_path) as log:
        log(Step("classifier", 1, 1, {"loss": 0.5, "rate": 0.1, "gradient_norm": 2.0}))
        log(Step("classifier", 2, 1, {"loss": 0.4, "rate": 0.1, "gradient_norm": 1.0, "mu": 0.985}))
        log(Step("segmenter", 1, 1, {"loss": 1 / 3, "rate": 0.1, "gradient_norm": 1.0}))
    assert [row["mu"] for row in rows_of(tmp_path, "classifier")] == ["", "0.985"]
    assert rows_of(tmp_path, "segmenter")[0]["loss"] == "0.333333"


class Writer:
    """Keep what would become TensorBoard events."""

    made: list[Writer] = []  # noqa: RUF012 - one list for the test

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_the_same_callback_writes_tensorboard_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with open_step_log(tmp_path, tensorboard=True) as log:
        log(Step("classifier", 5, 2, {"loss": 0.5, "rate": 0.1, "gradient_norm": 2.0, "mu": 0.9}))
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard" / "classifier"), 5, True)
    assert writer.scalars == [("loss", 0.5, 5), ("rate", 0.1, 5), ("gradient_norm", 2.0, 5), ("mu", 0.9, 5)]
    assert len(rows_of(tmp_path, "classifier")) == 1


def test_the_error_without_tensorboard_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(TrainConfigError, match="--tensorboard needs TensorBoard: pip install tensorboard"),
        open_step_log(tmp_path, tensorboard=True),
    ):
        pass
