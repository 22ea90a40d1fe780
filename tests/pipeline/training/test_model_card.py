from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.training.config import TrainConfig
from pipeline.training.dataset import load_dataset
from pipeline.training.model_card import make_card
from tests.textures import write_textures


def test_the_card_documents_data_and_training(tmp_path: Path) -> None:
    textures = load_dataset(write_textures(tmp_path, train=1, val=1, test=0, size=16))
    config = TrainConfig(weights="none", region=64, mpp=0.5, seed=12, encoder="resnet18")
    card = make_card(textures, config, 64, (0.1, 0.2, 0.05))
    assert card.gate_thresholds == (0.1, 0.2, 0.05)
    assert (card.classifier.backbone, card.classifier.head) == (config.backbone, config.head)
    assert card.segmenter.encoder == "resnet18"
    assert card.mpp == 0.5
    assert card.classes == textures.classes
    for said in ("Made by a program.", "regions of 64 px", "0.5 um/px", "seed 12", "none weights"):
        assert said in card.training_data
    several = make_card(textures, dataclasses.replace(config, classifier_mpp=(0.5, 0.75)), 64, (0.1,) * 3)
    assert "regions of 64 px at 0.5, 0.75 um/px, classifier" in several.training_data
    assert "head trained again" not in card.training_data
    shared = dataclasses.replace(config, encoder="", shared_backbone=True, head_epochs=1)
    said = "layers deep 1, the head trained again at 0.5 um/px on the segmenter's backbone, seed 12"
    assert said in make_card(textures, shared, 64, (0.1,) * 3).training_data
    by_default = dataclasses.replace(config, encoder=TrainConfig().encoder)
    assert make_card(textures, by_default, 64, (0.1,) * 3).segmenter.encoder == f"tu-{config.backbone}"


def test_the_card_names_a_file_of_initial_weights_without_its_folder(tmp_path: Path) -> None:
    textures = load_dataset(write_textures(tmp_path, train=1, val=1, test=0, size=16))
    config = TrainConfig(
        weights="/home/ada/first.safetensors", encoder_weights="/home/ada/second.safetensors", region=64, mpp=1.0
    )
    text = make_card(textures, config, 64, (0.1,) * 3).training_data
    assert text.endswith("started from first.safetensors weights, the encoder from second.safetensors.")
    assert "/home" not in text
