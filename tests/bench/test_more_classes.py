from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import load_bundle, load_networks, shipped_bundles
from tests.bench.more_classes import with_more_classes


@pytest.mark.parametrize("name", shipped_bundles())
def test_every_shipped_model_gets_more_classes(name: str, tmp_path: Path) -> None:
    made = with_more_classes(load_bundle(name), 9, tmp_path / "nine")
    assert len(made.card.classes) == len(made.card.gate_thresholds) == 9
    segmenter = load_networks(made)[1].state_dict()
    assert segmenter["segmentation_head.0.weight"].shape[0] == 9
