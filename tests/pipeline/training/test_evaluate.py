"""Scores against their definitions, and small real data sets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ClassMismatchError, InferenceError, MaskError
from pipeline.training.dataset import load_dataset, samples
from pipeline.training.evaluate import (
    PROTOCOLS,
    Evaluation,
    Protocol,
    Scores,
    confusion_matrix,
    evaluate,
    evaluate_samples,
    predict_image,
    scores,
)
from pipeline.training.model_card import score_metrics
from pipeline.training.patch_scores import PatchResults
from tests.models.networks import (
    ConstantClassifier,
    ConstantSegmenter,
)
from tests.pipeline.training.stripes import (
    gated_by_hand,
    predictor,
    stripes,
    without_masks,
    write_dataset,
)


def evaluation(
    pooled: dict[tuple[Protocol, bool], NDArray[np.int64]],
    matrices: dict[str, NDArray[np.int64]],
    cases: dict[str, str],
) -> Evaluation:
    """Return an evaluation with these matrices, whose patches all have both classes."""
    both = {name: np.ones((1, 2), bool) for name in matrices}
    patches = PatchResults(("a", "b"), 0.05, both, {True: both, False: both}, cases)
    return Evaluation(("a", "b"), pooled, matrices, cases, patches)


def slow_matrix(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> list[list[int]]:
    """Count pixel by pixel."""
    matrix = [[0] * (classes + 1) for _ in range(classes + 1)]
    for row, column in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        matrix[min(row, classes)][min(column, classes)] += 1
    return matrix


def slow_scores(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], names: Sequence[str], white: bool) -> Scores:
    """Apply the definitions to the kept pixels, one by one."""
    classes = len(names) - white
    pairs = [
        (min(t, classes), min(p, classes))
        for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True)
    ]
    if not white:
        pairs = [(t, p) for t, p in pairs if t < classes]
    iou = {}
    for k, name in enumerate(names):
        union = sum(t == k or p == k for t, p in pairs)
        iou[name] = sum(t == k and p == k for t, p in pairs) / union if union else float("nan")
    shares = [sum(t == k for t, _ in pairs) / len(pairs) for k in range(len(names))]
    known = [value for value in iou.values() if value == value]
    return Scores(
        iou,
        sum(known) / len(known),
        sum(share * value for share, value in zip(shares, iou.values(), strict=True) if share > 0),
        sum(t == p for t, p in pairs) / len(pairs),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", ["exclude", "include"])
def test_scores_agree_with_their_definitions_pixel_by_pixel(seed: int, protocol: Any) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.array([0, 1, 2, 255], np.uint8), (3, 9, 7))
    predicted = rng.integers(0, 4, (3, 9, 7)).astype(np.uint8)
    if seed == 0:
        truth[truth == 1], predicted[predicted == 1] = 0, 2
    names = ("a", "b", "c")
    matrix = confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == slow_matrix(truth, predicted, 3)
    actual = scores(matrix, names, protocol)
    white = protocol == "include"
    expected = slow_scores(truth, predicted, (*names, "white") if white else names, white)
    assert actual.iou == pytest.approx(expected.iou, nan_ok=True)
    assert np.isnan(actual.iou["b"]) == (seed == 0)
    assert (actual.miou, actual.fwiou, actual.accuracy) == pytest.approx(
        (expected.miou, expected.fwiou, expected.accuracy)
    )


def test_a_constant_prediction_has_the_known_scores() -> None:
    truth = np.repeat(np.array([0, 0, 0, 1, 255], np.uint8), 20)
    matrix = confusion_matrix(truth, np.zeros_like(truth), 2)
    exclude, include = (scores(matrix, ("a", "b"), protocol) for protocol in ("exclude", "include"))
    assert exclude == Scores({"a": 0.75, "b": 0.0}, 0.375, 0.75 * 0.75, 0.75)
    assert include == Scores({"a": 0.6, "b": 0.0, "white": 0.0}, 0.6 / 3, 0.6 * 0.6, 0.6)


def test_scores_without_a_counted_pixel_are_nan() -> None:
    empty = np.full((4, 4), 255, np.uint8)
    result = scores(confusion_matrix(empty, empty, 2), ("a", "b"))
    assert np.isnan([*result.iou.values(), result.miou, result.fwiou, result.accuracy]).all()
    assert scores(confusion_matrix(empty, empty, 2), ("a", "b"), "include").miou == 1.0


def test_names_that_do_not_fit_the_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\); 3 classes need \(4, 4\)"):
        scores(np.zeros((3, 3), np.int64), ("a", "b", "c"))


def test_a_perfect_model_scores_one_on_images_of_many_sizes(tmp_path: Path) -> None:
    masks = {"a": stripes(70, 150), "b": stripes(64, 64), "c": stripes(33, 200)}
    result = evaluate(predictor(), load_dataset(write_dataset(tmp_path, masks, background=True)))
    for protocol in PROTOCOLS:
        for gate in (True, False):
            assert result.scores(protocol, gate=gate).miou == 1.0
            assert result.matrices[protocol, gate].sum() == 70 * 150 + 64 * 64 + 33 * 200
    assert result.image_miou == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert result.names == ("class-0", "class-1")


def test_scores_are_pooled_over_images_and_kept_per_image(tmp_path: Path) -> None:
    half_HW = np.zeros((64, 64), np.uint8)
    half_HW[:, 32:] = 1
    masks = {"half": half_HW, "zero": np.zeros((64, 128), np.uint8), "white": np.full((8, 8), 255, np.uint8)}
    model = predictor(ConstantClassifier([0.9, 0.9]), ConstantSegmenter([1.0, 0.0]))
    seen: list[tuple[int, int]] = []
    result = evaluate(
        model, load_dataset(write_dataset(tmp_path, masks)), progress=lambda done, total: seen.append((done, total))
    )
    hit, wrong = 64 * 32 + 64 * 128, 64 * 32
    assert result.scores() == Scores(
        {"class-0": hit / (hit + wrong), "class-1": 0.0},
        hit / (hit + wrong) / 2,
        (hit / (hit + wrong)) ** 2,
        hit / (hit + wrong),
    )
    assert result.image_miou == pytest.approx({"half": 0.25, "zero": 1.0, "white": np.nan}, nan_ok=True)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_scores_with_and_without_the_gate_equal_single_predictions(tmp_path: Path) -> None:
    model, rgb_HWC = gated_by_hand()
    truth_HW = np.zeros((64, 96), np.uint8)
    truth_HW[:, 64:] = 1
    result = evaluate(model, load_dataset(write_dataset(tmp_path, {"a": truth_HW})))
    for gate in (True, False):
        labels_HW = predict_image(model, rgb_HWC, mpp=1.0, gate=gate)
        assert result.matrices["exclude", gate].tolist() == slow_matrix(truth_HW, labels_HW, 2)
    # As in test_the_gate_fades_by_the_windows_over_a_pixel, the gate makes the last columns of class 0 wrong.
    assert 64 / 96 < result.scores(gate=True).accuracy < 1
    assert result.scores(gate=False).accuracy == pytest.approx(32 / 96)
    assert result.image_miou == {"a": result.scores().miou}


def test_the_background_rule_predicts_white_for_protocol_include_which_needs_a_rule(
    tmp_path: Path,
) -> None:
    truth_HW = np.zeros((64, 64), np.uint8)
    truth_HW[:32] = 255
    truth_HW[60:, 60:] = 1
    masks = {"a": truth_HW}
    networks = ConstantClassifier([0.9, 0.9]), ConstantSegmenter([1.0, 0.0])
    with_rule = evaluate(predictor(*networks), load_dataset(write_dataset(tmp_path / "a", masks, background=True)))
    without = evaluate(predictor(*networks), load_dataset(write_dataset(tmp_path / "b", masks)))
    other, some, white = 64 * 32 - 16, 16, 64 * 32
    for result in (with_rule, without):
        assert result.matrices["exclude", True].tolist() == [[other, 0, 0], [some, 0, 0], [white, 0, 0]]
        assert result.scores().iou == {"class-0": other / (other + some), "class-1": 0.0}
    assert with_rule.matrices["include", True].tolist() == [[other, 0, 0], [some, 0, 0], [0, 0, white]]
    assert with_rule.scores("include").iou["white"] == 1.0
    assert (with_rule.protocols, without.protocols) == (("exclude", "include"), ("exclude",))


def test_predictions_do_not_depend_on_the_truth(tmp_path: Path) -> None:
    image_HW = stripes(64, 128)
    columns = []
    for n, mask_HW in enumerate((image_HW, 1 - image_HW, np.where(image_HW == 0, 255, 0).astype(np.uint8))):
        file = write_dataset(tmp_path / str(n), {"a": image_HW})
        Image.fromarray(mask_HW).save(tmp_path / str(n) / "test" / "mask" / "a.png")
        result = evaluate(predictor(), load_dataset(file))
        columns.append({key: matrix.sum(axis=0).tolist() for key, matrix in result.matrices.items()})
    assert columns[0] == columns[1] == columns[2]


def test_the_pixel_size_of_the_data_set_is_used(tmp_path: Path) -> None:
    truth_HW = stripes(256, 512).repeat(4, 0).repeat(4, 1)
    result = evaluate(predictor(), load_dataset(write_dataset(tmp_path, {"a": truth_HW}, mpp=0.25)))
    assert result.scores().miou == 1.0


def test_the_error_for_different_classes_lists_both(tmp_path: Path) -> None:
    file = write_dataset(tmp_path, {"a": stripes(64, 64)})
    file.write_text(file.read_text().replace('"class-1"', '"stroma"'))
    with pytest.raises(ClassMismatchError, match=r"has the classes class-0, class-1; data set tiny.*stroma; use a"):
        evaluate(predictor(), load_dataset(file))


def test_the_error_for_another_order_of_classes_asks_for_that_of_the_model(tmp_path: Path) -> None:
    file = write_dataset(tmp_path, {"a": stripes(64, 64)})
    text = file.read_text().replace('"class-1"', '"x"').replace('"class-0"', '"class-1"').replace('"x"', '"class-0"')
    file.write_text(text)
    with pytest.raises(ClassMismatchError, match=r"has class-1, class-0; list the classes in the dataset.toml in the"):
        evaluate(predictor(), load_dataset(file))


def test_without_masks_maps_are_compared_with_the_labels_of_patches(tmp_path: Path) -> None:
    one_HW, few_HW = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    few_HW[:, :1] = 1  # 1.6 % of the patch, which is less than the smallest share
    masks = {"a[10]": one_HW, "b[11]": few_HW, "c[01]": stripes(64, 64), "d[11]": stripes(64, 96)}
    found = evaluate(predictor(), load_dataset(without_masks(write_dataset(tmp_path, masks))))
    assert (found.matrices, found.image_matrices) == ({}, {})
    assert {name: rows_BK.tolist() for name, rows_BK in found.patches.found[True].items()} == {
        "a[10]": [[True, False]],
        "b[11]": [[True, False]],
        "c[01]": [[True, True]],
        "d[11]": [[True, True]],
    }
    assert found.patches.minimum == 0.05
    assert found.patches.count == 4
    assert found.patches.patches == {"class-0": 3, "class-1": 3}
    assert found.patches.mistakes("b[11]") == ((), ("class-1",))
    assert found.patches.mistakes("c[01]") == (("class-0",), ())
    assert [found.patches.wrong(name) for name in masks] == [0, 1, 1, 0]
    scores = found.patches.scores()
    assert scores.recall == {"class-0": 1.0, "class-1": 2 / 3}
    assert scores.specificity == {"class-0": 0.0, "class-1": 1.0}
    assert scores.precision == {"class-0": 3 / 4, "class-1": 1.0}
    assert scores.balanced == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert scores.exact == 0.5
    metrics = score_metrics("test", found)
    assert metrics == {"test_balanced": round(scores.balanced, 4), "test_exact": 0.5}


def test_a_class_that_the_gate_removes_is_not_found_in_a_patch(tmp_path: Path) -> None:
    ours = predictor(ConstantClassifier([0.9, 0.1]), ConstantSegmenter([0.0, 1.0]))
    found = evaluate(ours, load_dataset(without_masks(write_dataset(tmp_path, {"a[01]": stripes(64, 64)}))))
    assert found.patches.found[True]["a[01]"].tolist() == [[True, False]]
    assert found.patches.found[False]["a[01]"].tolist() == [[False, True]]


def test_a_single_image_without_a_mask_leaves_no_scores_of_pixels(tmp_path: Path) -> None:
    file = without_masks(write_dataset(tmp_path, {"a[11]": stripes(64, 96)}))
    dataset = load_dataset(file)
    (bare,) = samples(dataset, "test")
    masked = dataclasses.replace(bare, name="b", mask=tmp_path / "test" / "mask" / "a[11].png")
    assert evaluate_samples(predictor(), dataset, [masked]).matrices
    both = evaluate_samples(predictor(), dataset, [masked, bare])
    assert (both.matrices, both.patches.count) == ({}, 2)


def test_crops_of_masks_are_the_labeled_patches(tmp_path: Path) -> None:
    file = write_dataset(tmp_path, {"a": stripes(64, 96)})
    text = file.read_text().replace('train = [{ image = "train/*/*.png" }]\n', "")
    rule = '[labels]\nsource = "mask-crops"\nside = 32\nstride = 32\nminimum = 0.4\n'
    file.write_text(text[: text.index("[labels]")] + rule)
    found = evaluate(predictor(), load_dataset(file))
    # Columns 0 to 23 and 64 to 87 are class 1.
    row = [[False, True], [True, False], [False, True]]
    assert found.patches.present["a"].tolist() == found.patches.found[True]["a"].tolist() == row * 2
    assert found.patches.minimum == 0.4
    assert found.matrices


def test_the_error_for_a_nan_output_names_the_image(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"a": stripes(64, 64)}))
    with pytest.raises(InferenceError, match=r"a\.png: the segmenter's output is NaN"):
        evaluate(predictor(segmenter=ConstantSegmenter([float("nan"), 0.0])), dataset)


def test_the_spread_is_the_bootstrap_deviation_over_cases() -> None:
    rng = np.random.default_rng(5)
    matrices = {f"case {n}": rng.integers(0, 100, (3, 3)) for n in range(6)}
    pooled = np.sum(list(matrices.values()), axis=0)
    found = evaluation({("exclude", True): pooled}, matrices, {case: case for case in matrices})
    draws, cases = [], list(matrices.values())
    for _ in range(4000):
        matrix = np.sum([cases[rng.integers(6)] for _ in range(6)], axis=0)
        hit = [matrix[k][k] for k in range(2)]
        union = [matrix[k].sum() + matrix[:2, k].sum() - matrix[k][k] for k in range(2)]
        draws.append(sum(h / u for h, u in zip(hit, union, strict=True)) / 2)
    assert found.miou_spread() == pytest.approx(np.std(draws), rel=0.1)
    assert found.miou_spread() == found.miou_spread()


def test_a_single_case_has_no_spread() -> None:
    rng = np.random.default_rng(5)
    matrices = {name: rng.integers(1, 100, (3, 3)) for name in "xyz"}
    pooled: dict[tuple[Protocol, bool], NDArray[np.int64]] = {
        ("exclude", True): np.sum(list(matrices.values()), axis=0)
    }
    cases: dict[str, str] = dict.fromkeys(matrices, "one case")
    alone = evaluation(pooled, matrices, cases)
    assert math.isnan(alone.miou_spread())
    assert "val_miou" in score_metrics("val", alone)
    assert "val_miou_spread" not in score_metrics("val", alone)
    matrices["z"][:-1] = 0
    other = evaluation(pooled, matrices, cases | {"z": "a case of which no pixel counts"})
    assert math.isnan(other.miou_spread())
    assert evaluation(pooled, matrices, cases | {"y": "another case"}).miou_spread() > 0


def test_scores_of_masks_without_a_class_are_nan_without_a_warning(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"a": np.full((64, 64), 255, np.uint8)}))
    found = evaluate_samples(predictor(), dataset, samples(dataset, "test"))
    assert math.isnan(found.miou_spread())
    assert math.isnan(found.scores().miou)


def test_an_evaluation_without_a_counted_pixel_is_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, {"a": np.full((64, 64), 255, np.uint8)}))
    with pytest.raises(
        MaskError, match=r"tiny: no pixel of the masks of split test has a class; check mask_values and mask_excluded"
    ):
        evaluate(predictor(), dataset)


def test_images_of_a_case_are_pooled(tmp_path: Path) -> None:
    masks = {name: stripes(64, 64) for name in ("P1-a", "P1-b", "P2-a")}
    file = write_dataset(tmp_path, masks)
    alone = evaluate(predictor(), load_dataset(file))
    assert list(alone.group_matrices) == ["P1-a", "P1-b", "P2-a"]
    file.write_text(file.read_text() + "[group]\npattern = '^(P[0-9])-'\n")
    found = evaluate(predictor(), load_dataset(file))
    assert {case: matrix.sum() for case, matrix in found.group_matrices.items()} == {"P1": 2 * 64**2, "P2": 64**2}
    np.testing.assert_array_equal(np.sum(list(found.group_matrices.values()), axis=0), found.matrices["exclude", True])
