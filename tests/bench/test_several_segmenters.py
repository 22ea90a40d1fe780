from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import save_bundle
from models.card import NO_DIGEST, ClassifierCard, SegmenterCard
from models.classifier import Classifier
from models.predictor import Predictor
from models.segmenter import build_segmenter
from models.tissue_class import TissueClass
from pipeline.training.dataset import load_dataset, read_mask, read_rgb, samples
from pipeline.training.evaluate import confusion_matrix, predict_image, scores
from tests.bench.several_segmenters import MeanPredictor, main
from tests.models.networks import ConstantClassifier, ConstantSegmenter, make_card
from tests.textures import CLASSES, COLORS, write_textures

CARD = make_card(((200, 30, 30), (30, 200, 30), (30, 30, 200)))


def predictor(kind: type[Predictor], probabilities: list[float]) -> Predictor:
    networks = ConstantClassifier([0.9, 0.9, 0.9]), ConstantSegmenter(np.log(probabilities).tolist())
    return kind(CARD, NO_DIGEST, *networks, device="cpu", output_stride=1)


def test_segmenters_are_averaged_by_their_probabilities() -> None:
    mean = predictor(MeanPredictor, [0.6, 0.3, 0.1])
    assert isinstance(mean, MeanPredictor)
    mean.others = [predictor(Predictor, [0.1, 0.7, 0.2]), predictor(Predictor, [0.2, 0.2, 0.6])]
    logits_NKhw = mean.logits(np.zeros((2, 128, 96, 3), np.uint8))
    expected = torch.tensor([0.3, 0.4, 0.3]).view(1, 3, 1, 1).expand(2, 3, 64, 32)
    torch.testing.assert_close(logits_NKhw.softmax(dim=1), expected)


@pytest.mark.full
def test_the_command_measures_the_mean_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_textures(tmp_path / "data", train=1, val=3, test=0)
    card = make_card(COLORS, thresholds=[0.0, 0.0, 0.0]).model_copy(
        update={
            "classes": tuple(map(TissueClass, CLASSES, COLORS)),
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=3),
            "segmenter": SegmenterCard(encoder="resnet18", depth=4, rates=(1, 2, 4)),
        }
    )
    torch.manual_seed(0)
    classifier = Classifier("tf_efficientnet_lite0", "gap", 3, 3)
    runs = [tmp_path / name for name in ("first", "second")]
    # Only the gate of the first run counts. That of the second one lets no class pass.
    cards = [card, card.model_copy(update={"gate_thresholds": (0.9, 0.9, 0.9)})]
    bundles = [
        save_bundle(run / "bundle", own, classifier, build_segmenter("resnet18", 3))
        for run, own in zip(runs, cards, strict=True)
    ]

    def printed(*chosen: Path) -> list[str]:
        main([*map(str, chosen), "--dataset", str(file), "--data", str(file.parent), "--tta"])
        return capsys.readouterr().out.splitlines()

    predictors = [MeanPredictor.from_bundle(one, device="cpu", runtime="auto", output_stride=1) for one in bundles]
    predictors[0].others = predictors[1:]
    dataset = load_dataset(file)
    for flips, line in zip((False, True), printed(*runs), strict=True):
        matrix = sum(
            confusion_matrix(
                read_mask(dataset, sample), predict_image(predictors[0], read_rgb(sample), mpp=1.0, flips=flips), 3
            )
            for sample in samples(dataset, "val")
        )
        assert isinstance(matrix, np.ndarray)
        found = scores(matrix, CLASSES)
        assert found.accuracy > 0
        assert line.startswith(f"val{', symmetries' if flips else ''}: mIoU {100 * found.miou:.2f} (")
        assert f"dots {100 * found.iou['dots']:.2f}, " in line
        assert line.endswith(f", accuracy {100 * found.accuracy:.2f}")
    assert printed(runs[0], runs[0]) == printed(runs[0]) != printed(*runs)
    assert all(line.endswith("accuracy 0.00") for line in printed(*reversed(runs)))
