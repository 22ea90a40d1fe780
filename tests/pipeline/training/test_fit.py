from __future__ import annotations

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import TrainError
from pipeline.training import fit as loop
from pipeline.training.config import TrainConfig
from pipeline.training.fit import Processes, Task, fit, make_optimizer, rate_factor, time_steps
from tests.cases import full
from tests.pipeline.training.line import CONFIG, CPU, line_task, weights
from tests.repository import REPOSITORY


class Killed(Exception):  # noqa: N818 - not an error of the run's
    pass


@pytest.mark.parametrize("optimizer", ["adamw", full("sgd")])
@pytest.mark.parametrize("stop", [full(1), 3, full(4), full(5), full(11)])
def test_a_run_killed_after_any_step_ends_with_the_same_weights(
    tmp_path: Path, optimizer: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    config = TrainConfig(**{**vars(CONFIG), "optimizer": optimizer})
    whole = line_task()
    (tmp_path / "whole").mkdir()
    fit(whole, tmp_path / "whole", config, CPU)

    broken, folder = line_task(), tmp_path / "broken"
    folder.mkdir()

    def kill(_what: str, done: int, _total: int) -> None:
        if done == stop + 1:  # the checkpoint of step `stop` is the last one
            raise Killed

    with pytest.raises(Killed):
        fit(broken, folder, config, CPU, progress=kill)
    resumed = line_task()
    fit(resumed, folder, config, CPU)
    assert torch.equal(weights(resumed), weights(whole))
    curves = [(tmp_path / name / "line.csv").read_text().splitlines() for name in ("whole", "broken")]
    values = [[line.split(",")[:3] for line in lines] for lines in curves]
    assert values[0] == values[1]


def test_a_resumed_run_keeps_the_same_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed between the best epoch and a later one that is within the error of the best."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    scores = [(0.9, 0.2), (0.5, 0.2), (0.75, 0.2), (0.6, 0.2)]

    def scored(first: int) -> Task:
        task, given = line_task(epochs=4), iter(scores[first:])
        object.__setattr__(
            task, "validate", lambda _judged: dict(zip(("score", "score_error"), next(given), strict=True))
        )
        return task

    whole = scored(0)
    (tmp_path / "whole").mkdir()
    fit(whole, tmp_path / "whole", CONFIG, CPU)

    def kill(_what: str, done: int, _total: int) -> None:
        if done == 6:  # in the second epoch of four steps
            raise Killed

    (tmp_path / "broken").mkdir()
    with pytest.raises(Killed):
        fit(scored(0), tmp_path / "broken", CONFIG, CPU, progress=kill)
    resumed = scored(1)
    fit(resumed, tmp_path / "broken", CONFIG, CPU)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.full
def test_a_killed_process_resumes_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal, torch\n"
        "from pathlib import Path\n"
        "from pipeline.training import fit as loop\n"
        "from tests.pipeline.training.line import CONFIG, CPU, line_task, weights\n"
        "loop.CHECKPOINT_SECONDS = -1.0\n"
        "def kill(what, done, total):\n"
        "    if done == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "task = line_task()\n"
        "loop.fit(task, Path(sys.argv[1]), CONFIG, CPU, progress=kill)\n"
        "print(weights(task).double().sum().item())\n"
    )

    def run(folder: Path, step: int) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", program, str(folder), str(step)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=REPOSITORY,
        )

    whole = run(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path / "broken", 6).returncode == -signal.SIGKILL
    assert (tmp_path / "broken" / "line.checkpoint.safetensors").is_file()
    resumed = run(tmp_path / "broken", -1)
    assert resumed.stdout == whole.stdout != ""


def test_a_nan_loss_stops_the_run_and_the_error_names_the_step(tmp_path: Path) -> None:
    task = line_task(spoil=lambda step: math.nan if step == 6 else 1.0)
    with pytest.raises(TrainError, match=r"line: step 6 has loss nan.*Lower backbone_rate"):
        fit(task, tmp_path, CONFIG, CPU)
    assert torch.isfinite(weights(task)).all()


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.5, 0.4, 0.8])
    task = line_task(epochs=5)
    seen: list[Tensor] = []

    def validate(judged: nn.Module) -> dict[str, float]:
        seen.append(torch.cat([parameter.detach().ravel().clone() for parameter in judged.parameters()]))
        return {"score": next(scores)}

    object.__setattr__(task, "validate", validate)
    fit(task, tmp_path, TrainConfig(**{**vars(CONFIG), "patience": 2}), CPU)
    assert len(seen) == 4
    assert torch.equal(weights(task), seen[1])


def test_a_later_epoch_within_the_error_of_the_best_is_kept(tmp_path: Path) -> None:
    scores = iter([(0.1, 0.0), (0.9, 0.2), (0.6, 0.5), (0.75, 0.0), (0.5, 0.9)])
    task = line_task(epochs=5)
    seen: list[Tensor] = []

    def validate(judged: nn.Module) -> dict[str, float]:
        seen.append(torch.cat([parameter.detach().ravel().clone() for parameter in judged.parameters()]))
        return dict(zip(("score", "score_error"), next(scores), strict=True))

    object.__setattr__(task, "validate", validate)
    fit(task, tmp_path, CONFIG, CPU)
    assert len(seen) == 5
    # 0.75 is within 0.2 of 0.9, the best score; the errors of other epochs do not count.
    assert torch.equal(weights(task), seen[3])


def test_averaged_weights_are_the_running_mean_of_the_steps(tmp_path: Path) -> None:
    task, plain = line_task(epochs=1), line_task(epochs=1)
    config = TrainConfig(**{**vars(CONFIG), "ema": 0.5})
    steps: list[Tensor] = []
    fit(
        plain,
        tmp_path,
        TrainConfig(**{**vars(CONFIG), "ema": 0.0}),
        CPU,
        progress=lambda *_: steps.append(weights(plain)),
    )
    expected = weights(line_task())
    for n, now in enumerate(steps):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * now
    (tmp_path / "averaged").mkdir()
    fit(task, tmp_path / "averaged", config, CPU)
    torch.testing.assert_close(weights(task), expected)
    assert torch.equal(weights(plain), steps[-1])


def test_curves_are_written_as_csv_and_png(tmp_path: Path) -> None:
    fit(line_task(), tmp_path, CONFIG, CPU)
    with (tmp_path / "line.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["val_loss"]) < float(rows[0]["val_loss"])
    assert set(rows[0]) == {"epoch", "loss", "val_loss", "val_score", "data_seconds", "step_seconds"}
    with Image.open(tmp_path / "line.png") as picture:
        assert picture.size == (800, 300)


def test_rates_rise_over_the_warm_up_and_fall_by_cosine_or_polynomial() -> None:
    cosine = TrainConfig(warm_up=4)
    assert rate_factor(cosine, 0, 100) == pytest.approx(0.2)
    assert rate_factor(cosine, 50, 100) == pytest.approx(0.51)
    assert rate_factor(cosine, 100, 100) == pytest.approx(0.02)
    poly = TrainConfig(schedule="poly", warm_up=0)
    assert [rate_factor(poly, step, 4) for step in range(4)] == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0.25**0.9])


def test_new_parameters_have_their_own_rate_and_frozen_ones_have_none() -> None:
    task = line_task()
    next(iter(task.network.parameters())).requires_grad_(False)
    config = TrainConfig(backbone_rate=0.1, new_rate=0.7)
    task = dataclasses.replace(task, bias_factor=2.0)
    groups = make_optimizer(task, config).param_groups
    shapes = [(group["rate"], [tuple(parameter.shape) for parameter in group["params"]]) for group in groups]
    assert shapes == [(pytest.approx(0.2), [(8,)]), (0.7, [(1, 8)]), (1.4, [(1,)])]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_the_weight_decay_spares_biases_if_the_task_asks_for_it(optimizer: str, decay_biases: bool) -> None:
    task = dataclasses.replace(line_task(), decay_biases=decay_biases, momentum=0.25)
    config = TrainConfig(optimizer=optimizer, weight_decay=0.02)  # type: ignore[arg-type]  # one of the two
    groups = make_optimizer(task, config).param_groups
    for group in groups:
        is_bias = group["params"][0].ndim == 1
        assert group["weight_decay"] == (0.0 if is_bias and not decay_biases else 0.02)
        assert optimizer == "adamw" or group["momentum"] == 0.25


def test_timing_trains_a_few_steps(tmp_path: Path) -> None:
    task = line_task()
    before = weights(task)
    assert 0 < time_steps(task, CONFIG, CPU) < 10
    assert not torch.equal(weights(task), before)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    task = line_task(epochs=1, steps=1, spoil=lambda step: 1e6)
    before = weights(task)
    config = {**vars(CONFIG), "optimizer": "sgd", "weight_decay": 0.0, "warm_up": 0, "ema": 0.0, "clip": 2.0}
    fit(task, tmp_path, TrainConfig(**config), CPU)
    assert float((weights(task) - before).norm()) == pytest.approx(0.05 * 2.0, rel=1e-3)


@pytest.mark.parametrize(
    "content",
    [
        b"no checkpoint",
        safetensors.torch.save({"now/0.weight": torch.zeros(8, 1)}),
        safetensors.torch.save({"now/0.weight": torch.zeros(8, 1)}, {"state": "{}"}),
        safetensors.torch.save({"now/0.weight": torch.zeros(8, 1)}, {"state": '{"steps": 3}'}),
        safetensors.torch.save({"now/other": torch.zeros(1)}, {"state": "{}"}),
    ],
)
def test_the_error_names_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "line.checkpoint.safetensors").write_bytes(content)
    with pytest.raises(TrainError, match=r"line.checkpoint.safetensors: cannot be read .*delete it to repeat"):
        fit(line_task(), tmp_path, CONFIG, CPU)


@pytest.mark.full
def test_two_processes_train_the_same_weights_as_one(tmp_path: Path) -> None:
    program = tmp_path / "two.py"
    program.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from pipeline.training.fit import fit, join_processes\n"
        "from tests.pipeline.training.line import CONFIG, CPU, line_task, weights\n"
        "processes = join_processes(CPU)\n"
        "task = line_task(rank=processes.rank, world=processes.world, dropout=0.0)\n"
        "fit(task, Path(sys.argv[1]), CONFIG, CPU, processes)\n"
        "torch.save(weights(task), f'{sys.argv[1]}/rank{processes.rank}.pt')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(ranks[0], ranks[1])
    alone = line_task(dropout=0.0)
    (tmp_path / "alone").mkdir()
    fit(alone, tmp_path / "alone", CONFIG, CPU, Processes(0, 1))
    torch.testing.assert_close(ranks[0], weights(alone))
