"""A training task that takes milliseconds: fit a straight line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.training.config import TrainConfig
from pipeline.training.fit import Task

CPU = torch.device("cpu")


CONFIG = TrainConfig(backbone_rate=0.05, new_rate=0.05, warm_up=2, patience=99)


def line_task(
    *,
    epochs: int = 3,
    steps: int = 4,
    spoil: Callable[[int], float] = lambda _step: 1.0,
    rank: int = 0,
    world: int = 1,
    dropout: float = 0.2,
) -> Task:
    """Fits y = 2x - 1 with dropout, so that every random draw changes the weights."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
    done = [0]

    def make_batch(rng: np.random.Generator) -> Tensor:
        whole = torch.from_numpy(rng.uniform(-1, 1, (16, 1))).float()
        return whole[rank::world]

    def loss(x: Tensor) -> Tensor:
        done[0] += 1
        value: Tensor = ((network(x) - (2 * x - 1)) ** 2).mean() * spoil(done[0])
        return value

    def validate(judged: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 11)[:, None]
        with torch.inference_mode():
            error = float(((judged(x) - (2 * x - 1)) ** 2).mean())
        return {"loss": error, "score": -error}

    def begin_epoch(_epoch: int) -> None:
        network.train()

    return Task(
        name="line",
        network=network,
        new_parameters=list(network[3].parameters()),
        make_batch=make_batch,
        loss=loss,
        validate=validate,
        begin_epoch=begin_epoch,
        epochs=epochs,
        steps=steps,
    )


def weights(task: Task) -> Tensor:
    return torch.cat([parameter.detach().ravel() for parameter in task.network.parameters()])
