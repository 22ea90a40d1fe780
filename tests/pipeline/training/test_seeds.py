from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Bundle, load_bundle
from pipeline.training import seeds as module
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.seeds import summarized, train_seeds
from tests.textures import write_textures


def bundle_with(**metrics: float) -> Bundle:
    bundle = load_bundle("colon-gland")
    return replace(bundle, card=bundle.card.model_copy(update={"metrics": metrics}))


def test_every_seed_trains_in_a_folder_of_its_own_and_the_summary_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(write_textures(tmp_path / "data", train=1, val=1, test=1, size=16))
    seen: list[tuple[str, int, Any]] = []

    def trained(_: Dataset, run: Path, config: TrainConfig, **options: Any) -> Bundle:
        run.mkdir(parents=True)
        seen.append((run.name, config.seed, options))
        return bundle_with(val_miou=0.5 + config.seed / 10)

    monkeypatch.setattr(module, "train", trained)
    summary = train_seeds(dataset, tmp_path / "runs", TrainConfig(), (0, 3), test=True)
    assert seen == [("seed-0", 0, {"test": True}), ("seed-3", 3, {"test": True})]
    assert summary["metrics"] == {"val_miou": {"mean": 0.65, "spread": 0.2121, "values": [0.5, 0.8]}}
    assert json.loads((tmp_path / "runs" / "seeds.json").read_text()) == summary
    assert list(summary["bundles"]) == ["0", "3"]


def test_a_score_that_a_seed_lacks_has_no_mean_and_spread() -> None:
    found = summarized({0: bundle_with(a=1.0, b=2.0), 1: bundle_with(a=3.0, c=4.0)})
    assert found["metrics"] == {
        "a": {"mean": 2.0, "spread": 1.4142, "values": [1.0, 3.0]},
        "b": {"mean": None, "spread": None, "values": [2.0, None]},
        "c": {"mean": None, "spread": None, "values": [None, 4.0]},
    }
