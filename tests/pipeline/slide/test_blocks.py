from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.slide.blend import Blend
from wsi.box import Box

TILE = 8
MAP = Box(16, 32, 20, 12)


def window(i: int) -> float:
    return float(np.sin(np.pi * (i + 0.5) / TILE) ** 2)


def slow_blend(tiles: list[tuple[Box, np.ndarray]], classes: int) -> np.ndarray:
    """Return the weighted mean, computed pixel by pixel and tile by tile."""
    box = MAP
    result = np.zeros((classes, box.height, box.width))
    for y in range(box.height):
        for x in range(box.width):
            total = 0.0
            for tile, probs_Khw in tiles:
                i, j = box.y + y - tile.y, box.x + x - tile.x
                if 0 <= i < TILE and 0 <= j < TILE:
                    weight = window(i) * window(j)
                    result[:, y, x] += weight * probs_Khw[:, i, j]
                    total += weight
            if total:
                result[:, y, x] /= total
    return result


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(4, 40), st.integers(20, 48)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_overlapping_tiles_are_averaged_by_weight(corners: list[tuple[int, int]], classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = [(Box(x, y, TILE, TILE), rng.dirichlet(np.ones(classes + 1), (TILE, TILE)).T[:classes]) for x, y in corners]
    blend = Blend(MAP, classes, TILE, torch.device("cpu"))
    for box, probs_Khw in tiles:
        blend.add(box, torch.from_numpy(np.ascontiguousarray(probs_Khw)).float())
    tissue_HW = rng.random((12, 20)) < 0.9
    probs_KHW, labels_HW = blend.result(tissue_HW)
    expected = slow_blend(tiles, classes) * tissue_HW
    assert np.abs(probs_KHW - expected * 255).max() <= 0.51
    none_HW = 1 - expected.sum(axis=0)
    best_HW = expected.max(axis=0)
    clear_HW = np.abs(best_HW - none_HW) > 1e-4
    if classes > 1:
        clear_HW &= np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0] > 1e-4
    expected_labels = np.where(best_HW > none_HW, expected.argmax(axis=0) + 1, 0)
    np.testing.assert_array_equal(labels_HW[clear_HW], expected_labels[clear_HW])


@given(st.integers(0, 255), st.floats(0, 1))
def test_equal_tiles_give_an_equal_map(seed: int, probability: float) -> None:
    # Halfway between two stored values the last bit of the sums decides. 0.5 and similar values are not there.
    assume(all(abs((p * 255 + 0.5 + 2**-10) % 1 - 0.5) < 0.4999 for p in (probability, 1 - probability)))
    rng = np.random.default_rng(seed)
    blend = Blend(MAP, 2, TILE, torch.device("cpu"))
    for _ in range(12):
        box = Box(int(rng.integers(10, 34)), int(rng.integers(26, 42)), TILE, TILE)
        blend.add(box, torch.tensor([probability, 1 - probability]).view(2, 1, 1).expand(2, TILE, TILE))
    everywhere = np.ones((12, 20), bool)
    probs_KHW, _ = blend.result(everywhere)
    covered = probs_KHW.any(axis=0)
    assert all(len(np.unique(channel[covered])) == 1 for channel in probs_KHW) or not covered.any()


def test_no_class_competes_for_the_label() -> None:
    blend = Blend(MAP, 2, TILE, torch.device("cpu"))
    blend.add(Box(16, 32, TILE, TILE), torch.tensor([0.3, 0.15]).view(2, 1, 1).expand(2, TILE, TILE))
    blend.add(Box(24, 32, TILE, TILE), torch.tensor([0.15, 0.5]).view(2, 1, 1).expand(2, TILE, TILE))
    probs_KHW, labels_HW = blend.result(np.ones((12, 20), bool))
    assert labels_HW[0, [0, 7, 8, 15, 16]].tolist() == [0, 0, 2, 2, 0]
    assert probs_KHW[:, 0, 0].tolist() == pytest.approx([77, 38], abs=1)
    assert probs_KHW[:, 0, 16].tolist() == [0, 0]
