"""Training uses cuDNN in its steps, and not where images have many sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.dataset import Dataset
from pipeline.training.dry_run import dry_run
from pipeline.training.familiarity import fit_familiarity
from pipeline.training.prepare import prepare
from pipeline.training.train import train
from tests.pipeline.training.short_run import CONFIG

DECIDING = (
    "models.device_networks",
    "pipeline.training.dry_run",
    "pipeline.training.familiarity",
    "pipeline.training.fit",
    "pipeline.training.train",
)
"""The modules that ask whether cuDNN compiles sizes."""


def train_once(dataset: Dataset, run: Path) -> None:
    train(dataset, run, CONFIG, device="cpu")


def plan(dataset: Dataset, _: Path) -> None:
    dry_run(dataset, CONFIG, "cpu")


def fit_check(dataset: Dataset, _: Path) -> None:
    parts = prepare(dataset, CONFIG, None)
    fit_familiarity(parts.classifier.eval(), [(parts.training, parts.validation)], parts.config, "cpu")


STEP, NO_STEP = (True, True), (False, False)
"""Whether torch records gradients, and whether it uses cuDNN."""


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        pytest.param(train_once, {STEP, NO_STEP}, marks=pytest.mark.full),
        (plan, {STEP, NO_STEP}),
        (fit_check, {NO_STEP}),
    ],
)
def test_only_training_steps_use_cudnn_if_it_compiles_sizes(
    textures: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Dataset, Path], None],
    expected: set[tuple[bool, bool]],
) -> None:
    used: set[tuple[bool, bool]] = set()
    forward = nn.Conv2d._conv_forward

    def recorded(self: nn.Conv2d, *arguments: Any) -> Tensor:
        used.add((torch.is_grad_enabled(), bool(torch.backends.cudnn.enabled)))
        result: Tensor = forward(self, *arguments)
        return result

    for module in DECIDING:
        monkeypatch.setattr(f"{module}.compiles_sizes", lambda *_: True)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", recorded)
    # It would replace the method.
    monkeypatch.setattr("pipeline.training.fit.speed_up_depthwise", lambda _: None)
    work(textures, tmp_path / "run")
    assert used == expected
