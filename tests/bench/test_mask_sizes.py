from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.training.classifier import build_classifier
from pipeline.training.config import TrainConfig
from pipeline.training.dataset import load_dataset, samples
from pipeline.training.patches import PatchImages
from pipeline.training.pseudo_scores import pseudo_scores
from tests.bench.mask_sizes import main
from tests.textures import write_textures


def test_the_masks_of_a_run_are_measured_at_each_pixel_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_textures(tmp_path / "data", train=1, val=2, test=0, size=96)
    dataset, run = load_dataset(file), tmp_path / "run"
    config = TrainConfig(weights="none", region=96, confidence=0.0)
    torch.manual_seed(0)
    classifier = build_classifier(config, 3).eval()
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    safetensors.torch.save_file(classifier.state_dict(), run / "classifier.safetensors")
    main([str(run), "--dataset", str(file), "--data", str(file.parent), "--mpp", "1.0", "1.5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, mpp in zip(lines, (1.0, 1.5), strict=True):
        images = PatchImages(dataset, samples(dataset, "val"), mpp)
        (row,) = pseudo_scores(classifier, images, config, torch.device("cpu"))
        assert line == f"{mpp:g} µm/px, deep: mean IoU {float(row['miou']):.1%}, 0.0% ignored"
    assert lines[0].split("IoU")[1] != lines[1].split("IoU")[1]
