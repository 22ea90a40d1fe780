from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi import masks
from wsi.masks import close, grow, patches, pieces, shrink, thick

SHAPES = [(1, 1), (1, 9), (3, 2), (37, 53)]


def random_mask(shape: tuple[int, int], share: float, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < share


def beyond_the_edges(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.pad(mask_HW, 20, mode="edge")


def within_the_edges(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(mask_HW[20:-20, 20:-20])


@pytest.mark.parametrize("work_px", [1, 200, 1 << 19])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 0.97, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_operations_on_masks_equal_those_of_scipy(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], share: float, work_px: int
) -> None:
    monkeypatch.setattr(masks, "WORK_PX", work_px)
    for seed in range(5):
        mask_HW = random_mask(shape, share, seed)
        wide_HW = beyond_the_edges(mask_HW)
        np.testing.assert_array_equal(close(mask_HW), within_the_edges(ndimage.binary_closing(wide_HW, iterations=2)))
        for px in (1, 3, 6):
            np.testing.assert_array_equal(grow(mask_HW, px), ndimage.binary_dilation(mask_HW, iterations=px))
            np.testing.assert_array_equal(
                shrink(mask_HW, px), ndimage.binary_erosion(mask_HW, iterations=px, border_value=1)
            )
            np.testing.assert_array_equal(
                thick(mask_HW, px), within_the_edges(ndimage.binary_opening(wide_HW, iterations=px))
            )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_pixels_of_pieces_are_counted_and_chosen_like_their_labels(share: float) -> None:
    mask_HW, other_HW = random_mask((37, 53), share, 1), random_mask((37, 53), 0.5, 2)
    found = pieces(mask_HW)
    labels = range(found.number + 1)
    assert found.sizes().tolist() == [(found.labels_HW == label).sum() for label in labels]
    assert found.counts(other_HW).tolist() == [((found.labels_HW == label) & other_HW).sum() for label in labels]
    keep = np.arange(found.number + 1) % 3 != 1
    chosen_HW = np.isin(found.labels_HW, [label for label in labels if keep[label] and label])
    np.testing.assert_array_equal(found.chosen(keep), chosen_HW)


@pytest.mark.parametrize("reach", [0, 1, 7])
@pytest.mark.parametrize("share", [0.0, 0.0003, 0.01, 1.0])
def test_patches_contain_all_pixels_near_the_mask_once(share: float, reach: int) -> None:
    mask_HW = random_mask((150, 400), share, reach)
    count_HW = np.zeros(mask_HW.shape, int)
    for rows, columns in patches(mask_HW, reach):
        count_HW[rows, columns] += 1
        assert 0 < rows.stop - rows.start <= masks.PATCH_ROWS
    near_HW = ndimage.binary_dilation(mask_HW, np.ones((2 * reach + 1, 2 * reach + 1)))
    assert count_HW.max() <= 1
    assert count_HW[near_HW].all()
    assert mask_HW.any() or not count_HW.any()
