from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import State
from prefect.client.orchestration import SyncPrefectClient

from flows.train import train_bundle, train_flow
from models.bundle import load_bundle
from pipeline.training.config import TrainConfig
from tests.textures import write_textures

SETTINGS: dict[str, Any] = {
    "weights": "none",
    "region": 64,
    "classifier_epochs": 1,
    "classifier_steps": 1,
    "classifier_batch": 1,
    "segmenter_epochs": 1,
    "segmenter_steps": 1,
    "segmenter_batch": 2,
    "confidence": 0,
    "balance": False,
    "layer_weights": [0.0, 0.0, 1.0],
}


@pytest.mark.full
def test_a_training_shows_its_stages_and_metrics_and_writes_a_bundle(
    tmp_path: Path, harness: SyncPrefectClient
) -> None:
    data = write_textures(tmp_path / "data", train=4, val=2, test=1, size=64)
    run = tmp_path / "Run 1"
    state: State[Any] = train_flow(str(data), str(run), settings=SETTINGS, device="cpu", return_state=True)
    assert (state.name, state.message) == ("Completed", f"bundle in {run / 'bundle'}")
    metrics = load_bundle(run / "bundle").card.metrics
    shown = [one for one in harness.read_artifacts() if one.key == "training-run-1"]
    assert {row["metric"]: row["value"] for row in json.loads(str(shown[0].data))} == pytest.approx(metrics)
    bars = {one.description: one.data for one in harness.read_artifacts() if one.type == "progress"}
    assert {"classifier", "segmenter"} <= bars.keys()
    assert bars["segmenter"] == 100
    assert json.loads((run / "run.json").read_text())["config"]["balance"] is False


@pytest.mark.full
def test_a_training_with_an_unknown_setting_fails_with_the_reason(tmp_path: Path, harness: SyncPrefectClient) -> None:
    state: State[Any] = train_flow("glas", str(tmp_path), str(tmp_path), settings={"epochs": 1}, return_state=True)
    assert state.is_failed()
    assert (state.message or "").startswith("unknown setting 'epochs'; choose one of name, backbone")


def test_settings_of_a_flow_keep_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr("flows.train.load_dataset", lambda *_: SimpleNamespace(card=SimpleNamespace(settings={})))
    monkeypatch.setattr("flows.train.StageProgress", lambda: None)
    monkeypatch.setattr("flows.train.train", lambda _images, _output, config, **_: given.append(config))
    settings = {"frozen": ["conv_stem", "bn1"], "name": "2026", "region": None, "mpp": "none", "balance": False}
    train_bundle.fn("data", tmp_path, None, "default", settings, "cpu", test=False)
    (config,) = given
    assert (config.frozen, config.name, config.region, config.mpp, config.balance) == (
        ("conv_stem", "bn1"), "2026", None, None, False
    )  # fmt: skip
