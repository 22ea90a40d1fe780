from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.card import NO_DIGEST
from models.predictor import Predictor
from pipeline.training.dataset import load_dataset, samples
from tests.bench.colorectal import f1_score, map_table, table_of, tile_figures
from tests.bench.epithelium import gland_confusion, measure, table
from tests.bench.linear_probe import left_out_scores
from tests.models.networks import ColorClassifier, ColorSegmenter, make_card
from tests.pipeline.training.stripes import COLORS, stripes, write_dataset

# Six tiles of three classes, the last two with two labels.
LABELS_NK = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=bool)
SCORES_NK = np.array(
    [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1], [0.9, 0.05, 0.05]], np.float32
)


def test_figures_of_tiles_count_single_labels_and_hits_of_several() -> None:
    found = tile_figures(SCORES_NK, LABELS_NK)
    assert (found["tiles"], found["accuracy"], found["several_hit"]) == (4, 0.75, 0.5)
    # Class 0: one of two found, none wrong. Class 1: found, and one wrong. Class 2: found.
    assert found["f1"] == [0.67, 0.67, 1.0]
    assert found["macro_f1"] == round((2 / 3 + 2 / 3 + 1) / 3, 3)
    # Confidences 0.8, 0.6, 0.7 and 0.8 in three bins: |2/2 - 0.8| * 2/4 + |0 - 0.6| / 4 + |1 - 0.7| / 4.
    assert found["ece"] == pytest.approx(0.325, abs=1e-3)


def test_the_f1_score_is_0_if_nothing_is_true_or_predicted() -> None:
    none = np.zeros(3, dtype=bool)
    assert f1_score(none, none) == 0


def test_the_table_has_a_row_per_slide_and_the_pooled_confusion() -> None:
    text = table_of({"01": (SCORES_NK[:3], LABELS_NK[:3]), "02": (SCORES_NK[3:], LABELS_NK[3:])}, ("a", "b", "c"))
    assert "| pooled | 4 | 0.75 | 0.778 | 0.325 | 0.5 |" in text
    assert "| a | 1 | 1 | 0 | 0.67 |" in text


def test_the_map_of_a_slide_is_measured_for_the_classes_that_it_has(tmp_path: Path) -> None:
    # Rows are truth. Slide 01 has no pixel of class b, and its only pixel predicted as b belongs to a.
    first = np.array([[7, 1, 0], [0, 0, 0], [0, 0, 0]])
    second = np.array([[2, 0, 0], [2, 4, 2], [0, 0, 0]])  # two pixels of b have no class
    for slide, matrix in (("01", first), ("02", second)):
        (tmp_path / slide).mkdir()
        np.savez(tmp_path / slide / "maps.npz", gated=matrix, ungated=np.eye(3, dtype=int))
    text = map_table(tmp_path, ("a", "b"))
    assert "| 01 | 0.875 | 0.875 | 1.000 | 0.875 |  |" in text
    assert "| 02 | 0.500 | 0.600 | 1.000 | 0.500 | 0.500 |" in text
    # a: 9 of 12 in the union; b: 4 of 9.
    assert f"| pooled | {(9 / 12 + 4 / 9) / 2:.3f} | {13 / 18:.3f} | 1.000 | 0.750 | 0.444 |" in text
    assert "mean over the slides 0.688, standard deviation 0.265" in text


def test_the_probe_predicts_a_slide_from_the_others() -> None:
    rng = np.random.default_rng(0)
    truth_N = rng.integers(3, size=90)
    features_NC = torch.from_numpy(np.eye(3)[truth_N] * 3 + rng.normal(size=(90, 3))).float()
    slides_N = np.repeat(["01", "02", "03"], 30)
    scores_NK = left_out_scores([features_NC], np.eye(3, dtype=bool)[truth_N], slides_N, 1e-3)
    np.testing.assert_allclose(scores_NK.sum(axis=1), 1, atol=1e-5)
    assert (scores_NK.argmax(axis=1) == truth_N).mean() > 0.9
    # The labels of a slide do not change the predictions for it.
    changed_N = np.where(slides_N == "01", 0, truth_N)
    changed_NK = left_out_scores([features_NC], np.eye(3, dtype=bool)[changed_N], slides_N, 1e-3)
    np.testing.assert_array_equal(scores_NK[:30], changed_NK[:30])


def test_classes_of_epithelium_are_measured_together(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"one": stripes(64, 64)}))
    predictor = Predictor(
        make_card(COLORS), NO_DIGEST, ColorClassifier(COLORS), ColorSegmenter(COLORS, 400.0), output_stride=1
    )
    (counts_2P,) = measure(predictor, dataset, samples(dataset, "test"), gate=True)
    assert counts_2P.sum() == 64 * 64
    names = ["class-0", "class-1"]
    matrix = gland_confusion(counts_2P, names, ["class-1"])
    assert matrix[0, 0] + matrix[1, 1] > 0.95 * 64 * 64
    swapped = gland_confusion(counts_2P, names, ["class-0"])
    assert swapped[0, 1] == matrix[0, 0]


def test_the_table_has_the_share_of_each_predicted_class_and_of_no_class() -> None:
    counts_2P = np.array([[1, 1, 0, 2], [0, 9, 1, 0]])
    lines = table({"benign": counts_2P}, ["other", "gland"], ["a", "b", "c"]).splitlines()
    assert lines[0] == "| diagnosis | mask | a | b | c | no class |"
    assert lines[2:] == ["| benign | other | 25 | 25 | 0 | 50 |", "| benign | gland | 0 | 90 | 10 | 0 |"]
