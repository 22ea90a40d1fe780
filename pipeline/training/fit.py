"""The training loop of both networks: checkpoints, weight averaging, early stopping, curves and several processes.

The random draws of a step depend only on (seed, stage, step). A run that was killed at any point and resumes from its
last checkpoint therefore ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
import torch.distributed
from torch import Tensor, nn

from models.depthwise import speed_up_depthwise
from models.devices import choose_device, compiles_sizes, native_convolutions
from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.training.config import TrainConfig
from pipeline.training.step_log import Step, StepLog
from pipeline.training.tensor_files import reading, write_tensors

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""Seconds between checkpoints within an epoch. Each epoch also ends with a checkpoint."""


class Processes(NamedTuple):
    """The rank of this training process, and the number of processes."""

    rank: int
    world: int


def join_processes(device: torch.device) -> Processes:
    """Join the process group that torchrun created, and return (0, 1) if there is none."""
    if "RANK" not in os.environ:
        return Processes(0, 1)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    if not torch.distributed.is_initialized():
        # The other processes wait while one process measures a large test split.
        patience = timedelta(hours=12)
        torch.distributed.init_process_group(torch.distributed.get_default_backend_for_device(device), timeout=patience)
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def training_device(name: str) -> torch.device:
    """Return the device of this name (see `choose_device`); "auto" under torchrun is the GPU of the local rank."""
    chosen = choose_device(name)
    if name == "auto" and "LOCAL_RANK" in os.environ and chosen.type != "cpu":
        return choose_device(f"{chosen.type}:{os.environ['LOCAL_RANK']}")
    return chosen


@dataclass(frozen=True)
class Task:
    """What is trained, and how to compute one step and one validation."""

    name: str
    """Name of the stage and of its files."""
    network: nn.Module
    new_parameters: list[nn.Parameter]
    """Parameters without pretrained weights. All other trainable parameters use the backbone's learning rate."""
    make_batch: Callable[[np.random.Generator], Any]
    """Draw this process's share of a batch; called in another thread while the device computes."""
    loss: Callable[[Any], Tensor]
    """Return the loss of a batch, with the network in training mode."""
    validate: Callable[[nn.Module], dict[str, float]]
    """Return measures on held-out presence labels. The epoch with the highest "score" is kept. If the measures also
    contain "score_error", the standard error of the score, the last epoch within the error of the best one is kept."""
    begin_epoch: Callable[[int], None]
    """Put the network into training mode for a 0-based epoch."""
    epochs: int
    steps: int
    """Steps per epoch."""
    bias_factor: float = 1.0
    """Factor on the learning rates of biases."""
    decay_biases: bool = True
    """Whether the weight decay applies to biases."""
    momentum: float = 0.9
    """Momentum of `sgd`."""
    step_values: Callable[[], dict[str, float]] = dict
    """Return more values of a step for its log."""


@dataclass
class _State:
    """Everything in a checkpoint except tensors."""

    step: int = 0
    best: float = -math.inf
    enough: float = math.inf
    """Lowest score at which a later epoch is kept."""
    stale: int = 0
    """Epochs since the best epoch."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps of this epoch."""
    data_seconds: float = 0.0
    step_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    task: Task,
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    processes: Processes = Processes(0, 1),  # noqa: B008 - an immutable tuple
    progress: Progress | None = None,
    log: StepLog | None = None,
) -> None:
    """Train the network and leave the best weights in it. `log` is called after every step.

    Training stops after the last epoch, or if the score has not risen for `patience` epochs. Writes
    <name>.checkpoint.safetensors, and the curves as <name>.csv and <name>.png, into `folder`. Raises TrainError if the
    loss or a gradient is NaN or infinite, or if the checkpoint cannot be read, and OutputError if it cannot be written.
    """
    network = task.network
    if device.type == "cpu":
        speed_up_depthwise(network)
    optimizer = make_optimizer(task, config)
    total = task.epochs * task.steps
    averaged, best = copy.deepcopy(network), copy.deepcopy(network)
    checkpoint = folder / f"{task.name}.checkpoint.safetensors"
    state = _load(checkpoint, {"now": network, "mean": averaged, "best": best}, optimizer) or _State()
    if state.step:
        logger.info("%s: resuming after step %d of %d", task.name, state.step, total)
    saved = time.monotonic()
    batches = _prefetched(task, config.seed, state.step, total)
    if state.step % task.steps:
        task.begin_epoch(state.step // task.steps)
    while state.step < total and state.stale < config.patience:
        epoch, within = divmod(state.step, task.steps)
        if within == 0:
            task.begin_epoch(epoch)
            state.losses, state.data_seconds, state.step_seconds = [], 0.0, 0.0
        asked = time.perf_counter()
        batch = next(batches)
        started = time.perf_counter()
        factor = rate_factor(config, state.step, total)
        _set_rates(optimizer, factor)
        torch.manual_seed(_seed(config.seed, task.name, state.step, processes.rank))  # dropout
        loss, norm = _step(task, batch, optimizer, config, device, processes, state)
        state.losses.append(loss)
        _average_into(averaged, network, min(config.ema, (1 + state.step) / (10 + state.step)))
        state.step += 1
        state.data_seconds += started - asked
        state.step_seconds += time.perf_counter() - started
        if log is not None and processes.rank == 0:
            values = {"loss": loss, "rate": config.new_rate * factor, "gradient_norm": norm, **task.step_values()}
            log(Step(task.name, state.step, epoch + 1, values))
        if progress is not None:
            progress(task.name, state.step, total)
        if within == task.steps - 1:
            if processes.world > 1:
                _share_statistics(network, averaged)
            with native_convolutions(compiles_sizes(device, network)):  # whole images have more sizes than steps
                _end_epoch(task, averaged, best, epoch, state, config, folder if processes.rank == 0 else None)
        # Also at the end of every epoch, so that a validation is never repeated.
        if processes.rank == 0 and (within == task.steps - 1 or time.monotonic() - saved > CHECKPOINT_SECONDS):
            _save(checkpoint, {"now": network, "mean": averaged, "best": best}, optimizer, state)
            saved = time.monotonic()
    batches.close()
    network.load_state_dict(best.state_dict())


def time_steps(task: Task, config: TrainConfig, device: torch.device, steps: int = 3) -> float:
    """Return the seconds of a training step: the median of a few, after one that is not counted.

    The next batches are made in two threads beside a step, so a step takes as long as the slower of the two. The
    weights of the network change.
    """
    if device.type == "cpu":
        speed_up_depthwise(task.network)
    optimizer = make_optimizer(task, config)
    task.begin_epoch(0)
    seconds = []
    for step in range(steps + 1):
        asked = time.perf_counter()
        batch = task.make_batch(np.random.default_rng(_seed(config.seed, f"{task.name} batch", step)))
        started = time.perf_counter()
        _step(task, batch, optimizer, config, device, Processes(0, 1), _State(step))
        seconds.append(max(time.perf_counter() - started, (started - asked) / 2))
    return float(np.median(seconds[1:]))


def remove_checkpoint(folder: Path, name: str) -> None:
    """Remove the checkpoint of a stage whose product has been written."""
    (folder / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)


def make_optimizer(task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that require a gradient.

    Pretrained weights, pretrained biases, new weights and new biases form one group each. The group's "rate" is its
    learning rate before warm-up and schedule.
    """
    new = {id(parameter) for parameter in task.new_parameters}
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in task.network.named_parameters():
        if parameter.requires_grad:
            members.setdefault((id(parameter) in new, name.split(".")[-1] == "bias"), []).append(parameter)
    groups = []
    for (is_new, is_bias), parameters in sorted(members.items()):
        rate = (config.new_rate if is_new else config.backbone_rate) * (task.bias_factor if is_bias else 1.0)
        decay = config.weight_decay if task.decay_biases or not is_bias else 0.0
        groups.append({"params": parameters, "lr": rate, "rate": rate, "weight_decay": decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=task.momentum)
    return torch.optim.AdamW(groups)


def rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """Return the factor on the learning rates in a 0-based step: warm-up, then cosine to 0.02 or (1-t)^0.9."""
    warm = min(1.0, (step + 1) / (config.warm_up + 1))
    done = step / total
    if config.schedule == "poly":
        return warm * float((1 - done) ** 0.9)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _step(
    task: Task,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    state: _State,
) -> tuple[float, float]:
    """Train one step and return the loss and the norm of the gradient before clipping. Raises TrainError."""
    optimizer.zero_grad(set_to_none=True)
    # bfloat16 needs no loss scaling. On a CPU it made the default recipe slower.
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with autocast:
        loss = task.loss(batch)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if processes.world > 1:
        loss = _mean_over_processes(loss, parameters, processes.world)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf).item()
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise TrainError(
            f"{task.name}: step {state.step + 1} has loss {value} and gradient norm {norm}; the last losses "
            f"were {[round(v, 4) for v in state.losses[-5:]]}. Lower backbone_rate and new_rate, set clip, or look for "
            "blank images; the same command resumes from the last checkpoint"
        )
    optimizer.step()
    return value, norm


def _mean_over_processes(loss: Tensor, parameters: list[nn.Parameter], world: int) -> Tensor:
    """Replace all gradients by their mean over the processes in one message, and return the mean loss."""
    loss = loss.detach().clone().reshape(1)
    values = [loss, *(p.grad.reshape(-1) for p in parameters if p.grad is not None)]
    flat = torch.cat(values)
    torch.distributed.all_reduce(flat)
    flat /= world
    pieces = flat.split([len(value) for value in values])
    for parameter, piece in zip(parameters, pieces[1:], strict=True):
        parameter.grad = piece.view_as(parameter)
    mean: Tensor = pieces[0][0]
    return mean


def _share_statistics(*networks: nn.Module) -> None:
    """Copy the batch-norm statistics of rank 0 to all processes, so that all get equal scores and stop together."""
    for network in networks:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)


def _end_epoch(
    task: Task,
    averaged: nn.Module,
    best: nn.Module,
    epoch: int,
    state: _State,
    config: TrainConfig,
    folder: Path | None,
) -> None:
    """Validate the network, keep its weights if they are the best or about as good, and write the curves."""
    validated = averaged if config.ema else task.network
    measures = task.validate(validated.eval())
    score, error = measures["score"], measures.get("score_error")
    state.stale += 1
    if score > state.best:
        state.best, state.stale = score, 0
        state.enough = math.inf if error is None else score - error
    if state.stale == 0 or score >= state.enough:
        best.load_state_dict(validated.state_dict())
    state.history.append(
        {"epoch": epoch + 1, "loss": float(np.mean(state.losses))}
        | {f"val_{name}": value for name, value in measures.items()}
        | {"data_seconds": round(state.data_seconds, 2), "step_seconds": round(state.step_seconds, 2)}
    )
    logger.info("%s %s", task.name, " ".join(f"{k} {v:.4g}" for k, v in state.history[-1].items()))
    if folder is not None:
        _write_curves(folder / task.name, state.history)


def _write_curves(stem: Path, history: list[dict[str, float]]) -> None:
    temporary = stem.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    temporary.replace(stem.with_suffix(".csv"))

    # Not pyplot, which opens a backend and keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name in history[0]:
        if name == "epoch" or name.endswith("seconds"):
            continue
        axes = left if name.endswith("loss") else right
        axes.plot(epochs, [row[name] for row in history], marker=".", label=name)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.legend()
    temporary = stem.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(stem.with_suffix(".png"))


@torch.no_grad()
def _average_into(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for old, new in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor


def _seed(seed: int, name: str, step: int, rank: int = 0) -> int:
    return zlib.crc32(f"{seed} {name} {step} {rank}".encode())


def _prefetched(task: Task, seed: int, first: int, total: int) -> Generator[Any]:
    """Yield the batches of all steps from `first` on, and prepare the next two in other threads."""

    def make(step: int) -> Any:
        # Every process uses the same generator and takes its share of the same batch.
        return task.make_batch(np.random.default_rng(_seed(seed, f"{task.name} batch", step)))

    with ThreadPoolExecutor(2, thread_name_prefix="batch") as pool:
        waiting = [pool.submit(make, step) for step in range(first, min(first + 2, total))]
        for step in range(first, total):
            batch = waiting.pop(0).result()
            if step + 2 < total:
                waiting.append(pool.submit(make, step + 2))
            yield batch


def _save(file: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, state: _State) -> None:
    tensors = {
        f"{name}/{key}": tensor for name, network in networks.items() for key, tensor in network.state_dict().items()
    }
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": tensor for key, tensor in values.items()}
    write_tensors(file, tensors, {"state": json.dumps(vars(state))})


def _load(file: Path, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> _State | None:
    if not file.is_file():
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    with reading(file):
        with safetensors.safe_open(file, "pt") as opened:
            state = _State(**json.loads(opened.metadata()["state"]))
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                part, _, name = key.partition("/")
                tensors.setdefault(part, {})[name] = opened.get_tensor(key)
        for name, network in networks.items():
            network.load_state_dict(tensors[name])
        whole = optimizer.state_dict()
        for key, tensor in tensors.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            whole["state"].setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict(whole)
    return state
