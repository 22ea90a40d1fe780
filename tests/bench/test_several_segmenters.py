from __future__ import annotations

import numpy as np
import torch

from models.card import NO_DIGEST
from models.predictor import Predictor
from tests.bench.several_segmenters import MeanPredictor
from tests.models.networks import ConstantClassifier, ConstantSegmenter, make_card

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
