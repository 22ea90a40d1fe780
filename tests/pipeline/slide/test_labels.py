from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.slide.labels import stored_map, winners


def test_no_class_competes_for_the_label() -> None:
    # One row of five pixels: the rest to one is the probability of "no class".
    probs_KHW = torch.tensor([[0.3, 0.45, 0.15, 0.0, 0.5], [0.15, 0.5, 0.5, 0.0, 0.5]])[:, None]
    bytes_KHW, labels_HW, has_class_HW = stored_map(probs_KHW, np.ones((1, 5), bool))
    assert labels_HW.tolist() == [[0, 2, 2, 0, 1]]
    assert bytes_KHW[:, 0, 0].tolist() == pytest.approx([77, 38], abs=1)
    assert bytes_KHW[:, 0, 3].tolist() == [0, 0]
    assert has_class_HW.tolist() == [[True, True, True, False, True]]


def test_outside_the_tissue_there_is_nothing() -> None:
    tissue_HW = np.array([[True, False]])
    bytes_KHW, labels_HW, has_class_HW = stored_map(torch.full((2, 1, 2), 0.5), tissue_HW)
    assert bytes_KHW.tolist() == [[[128, 0]], [[128, 0]]]
    assert labels_HW.tolist() == [[1, 0]]
    assert has_class_HW.tolist() == [[True, False]]


def test_the_last_bit_of_a_probability_does_not_change_a_byte() -> None:
    one_half = torch.tensor([0.5]).nextafter(torch.tensor([0.0]))
    bytes_KHW = stored_map(torch.stack([one_half, torch.tensor([0.5])])[:, None], np.ones((1, 1), bool)).probs_KHW
    assert bytes_KHW.ravel().tolist() == [128, 128]


def test_a_map_of_several_strips_has_the_values_of_its_rows() -> None:
    rest_and_probs = torch.rand((4, 300, 5), generator=torch.Generator().manual_seed(0)).softmax(dim=0)
    probs_KHW, tissue_HW = rest_and_probs[1:], np.random.default_rng(0).random((300, 5)) < 0.9
    found = stored_map(probs_KHW, tissue_HW)
    rows = [stored_map(probs_KHW[:, y : y + 1], tissue_HW[y : y + 1]) for y in range(300)]
    for n, whole in enumerate(found):
        np.testing.assert_array_equal(whole, np.concatenate([row[n] for row in rows], axis=-2))


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_the_winner_is_the_first_of_the_most_probable_classes_unless_no_class_is_more_probable(classes: int) -> None:
    # Sixths, so that many classes are equally probable.
    shares = np.random.default_rng(classes).multinomial(6, [1 / (classes + 1)] * (classes + 1), size=(9, 11)) / 6
    probs_KHW = torch.from_numpy(shares[..., :classes].transpose(2, 0, 1).astype(np.float32))
    expected_HW = np.empty((9, 11), int)
    for y, x in np.ndindex(9, 11):
        column_K = probs_KHW[:, y, x].tolist()
        best = column_K.index(max(column_K))
        rest = 1 - float(probs_KHW[:, y, x].sum())
        expected_HW[y, x] = best if column_K[best] > 0 and column_K[best] >= rest else classes
    assert winners(probs_KHW).tolist() == expected_HW.tolist()
    assert {classes, 0} <= set(expected_HW.ravel().tolist())
