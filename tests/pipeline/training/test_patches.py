from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.training.augment import Augmentation, Move
from pipeline.training.dataset import load_dataset, read_rgb, samples
from pipeline.training.patches import (
    PatchImages,
    Place,
    at_pixel_sizes,
    boxes_inside,
    boxes_of_view,
    cut,
    draw_patches,
    draw_regions,
    draw_squares,
    make_labeled_view,
    make_view,
)
from pipeline.training.resample import resampled
from tests.textures import write_crops


def crops(
    folder: Path,
    sizes: dict[str, tuple[int, int]],
    *,
    side: int = 16,
    stride: int = 8,
    mpp: float = 1.0,
    cache_bytes: int = 2**20,
) -> PatchImages:
    dataset = load_dataset(write_crops(folder, sizes, side=side, stride=stride))
    return PatchImages(dataset, samples(dataset, "train"), mpp, cache_bytes=cache_bytes)


class Sized(PatchImages):
    """Return images of which only the labeled boxes matter."""

    def __init__(self, sizes: list[tuple[int, int]], side: int, stride: int) -> None:
        self.boxes = [grid(width, height, side, stride) for width, height in sizes]
        self.sizes_N2 = np.array(sizes)
        self.ends_N = np.cumsum([len(boxes_B4) for boxes_B4 in self.boxes])

    def __len__(self) -> int:
        return len(self.boxes)


def grid(width: int, height: int, side: int, stride: int) -> NDArray[np.int64]:
    """Return crops of `side` every `stride` pixels, and those at the right and lower edges."""
    side = min(side, width, height)
    xs, ys = (sorted({*range(0, length - side + 1, stride), length - side}) for length in (width, height))
    return np.array([(x, y, side, side) for y in ys for x in xs])


def moved_as(view_HWC: NDArray[np.uint8], still_HWC: NDArray[np.uint8]) -> Move:
    """Return the symmetry that turns `still_HWC` into `view_HWC`."""
    (found,) = [
        move
        for move in (Move(turns, flip) for turns in range(4) for flip in (False, True))
        if np.array_equal(move.image(still_HWC), view_HWC)
    ]
    return found


def test_images_at_other_pixel_sizes_are_those_that_are_read_at_these_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = crops(tmp_path, {"a": (40, 48), "b": (31, 37)})
    fresh = [PatchImages(images.dataset, images.samples, mpp) for mpp in (0.7, 2.0)]
    # The labels are not read again.
    monkeypatch.delattr("pipeline.training.patches.labeled_boxes")
    assert at_pixel_sizes(images, ()) == [images]
    for found, expected in zip(at_pixel_sizes(images, (0.7, 2.0)), fresh, strict=True):
        np.testing.assert_array_equal(found.sizes_N2, expected.sizes_N2)
        for n in range(2):
            np.testing.assert_array_equal(found.boxes[n], expected.boxes[n])
            np.testing.assert_array_equal(found.present[n], expected.present[n])
            np.testing.assert_array_equal(found.rgb(n), expected.rgb(n))


def test_a_view_is_a_square_of_the_image_and_its_patches_move_along(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (40, 48)})
    whole_HWC = read_rgb(images.samples[0])
    for seed in range(8):
        place = Place(0, 6, 10, 32)
        view = make_view(images, place, Augmentation(), np.random.default_rng(seed))
        still_HWC = whole_HWC[10:42, 6:38]
        moved_as(view.rgb_HWC, still_HWC)
        expected = {
            (x, y): present.tolist()
            for (x, y, _, _), present in zip(images.boxes[0].tolist(), images.present[0], strict=True)
            if x >= 6 and x + 16 <= 38 and y >= 10 and y + 16 <= 42
        }
        assert len(expected) == len(view.boxes_B4) == 4
        # A box covers the same pixels as before the move, in some orientation, so their sorted bytes identify the box.
        seen = {
            np.sort(whole_HWC[y : y + 16, x : x + 16].reshape(-1, 3), axis=0).tobytes(): p
            for (x, y), p in expected.items()
        }
        for (x, y, w, h), present_K in zip(view.boxes_B4.tolist(), view.present_BK.tolist(), strict=True):
            assert seen.pop(np.sort(view.rgb_HWC[y : y + h, x : x + w].reshape(-1, 3), axis=0).tobytes()) == present_K
        assert not seen


def test_beyond_its_edges_an_image_is_mirrored(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (20, 24)})
    around_HWC = np.pad(images.rgb(0), [(30, 30), (30, 30), (0, 0)], mode="symmetric")
    for x, y in ((-7, -29), (5, 3), (14, 20), (-30, 10)):
        still_HWC = cut(images.rgb(0), Place(0, x, y, 32))
        np.testing.assert_array_equal(still_HWC, around_HWC[30 + y : 62 + y, 30 + x : 62 + x])
        labels_LHW = images.rgb(0).transpose(2, 0, 1)[:2]
        rgb_HWC, moved_LHW = make_labeled_view(
            images, labels_LHW, Place(0, x, y, 32), Augmentation(), np.random.default_rng(3)
        )
        moved_as(rgb_HWC, still_HWC)
        np.testing.assert_array_equal(moved_LHW, rgb_HWC.transpose(2, 0, 1)[:2])


@settings(max_examples=20)
@given(st.integers(-60, 60), st.integers(-60, 60), st.integers(8, 70))
def test_a_view_has_the_patches_of_the_mirror_images_too(x: int, y: int, side: int) -> None:
    boxes_B4, size_2 = grid(20, 26, 8, 6), np.array([20, 26])
    place = Place(0, x, y, side)
    found_B4, index_B = boxes_of_view(boxes_B4, size_2, place)
    # Every pixel has a number of its own, so a box of the view has the numbers of its patch, in some orientation.
    numbers_HW = np.arange(20 * 26).reshape(26, 20)
    view_HW = np.pad(numbers_HW, 140, mode="symmetric")[140 + y : 140 + y + side, 140 + x : 140 + x + side]
    for (left, top, width, height), index in zip(found_B4.tolist(), index_B.tolist(), strict=True):
        own_x, own_y, *_ = boxes_B4[index].tolist()
        assert left >= 0
        assert top >= 0
        seen, own = view_HW[top : top + height, left : left + width], numbers_HW[own_y : own_y + 8, own_x : own_x + 8]
        assert seen.shape == (8, 8)
        assert set(seen.ravel()) == set(own.ravel())
    whole = {
        (int(left), int(top), index)
        for index, (own_x, own_y, *_) in enumerate(boxes_B4.tolist())
        for left in range(side - 7)
        for top in range(side - 7)
        if set(view_HW[top, left : left + 8]) == set(numbers_HW[own_y, own_x : own_x + 8])
        or set(view_HW[top, left : left + 8]) == set(numbers_HW[own_y + 7, own_x : own_x + 8])
    }
    # Straddling an axis, a window may hold the same set of numbers twice; a patch holds each once.
    assert {(x, y, i) for (x, y, *_), i in zip(found_B4.tolist(), index_B.tolist(), strict=True)} <= whole


def test_a_labeled_view_has_the_labels_of_its_pixels(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (40, 40)})
    labels_LHW = images.rgb(0).transpose(2, 0, 1)[:2]
    seen = set()
    for seed in range(60):
        rgb_HWC, moved_LHW = make_labeled_view(
            images, labels_LHW, Place(0, 4, 7, 32), Augmentation(), np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(moved_LHW, rgb_HWC.transpose(2, 0, 1)[:2])
        seen.add(moved_as(rgb_HWC, images.rgb(0)[7:39, 4:36]))
    assert len(seen) == 8


def test_equal_seeds_give_equal_views_and_other_seeds_other_views(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (40, 40)})
    one, again, other = (
        make_view(images, Place(0, 0, 0, 32), Augmentation(stain=0.3), np.random.default_rng(seed))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one.rgb_HWC, again.rgb_HWC)
    np.testing.assert_array_equal(one.boxes_B4, again.boxes_B4)
    assert not np.array_equal(one.rgb_HWC, other.rgb_HWC)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20)), max_size=12),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 40),
)
def test_boxes_inside_a_place_have_no_pixel_outside(
    boxes: list[tuple[int, int, int, int]], x: int, y: int, side: int
) -> None:
    found_B4, inside_B = boxes_inside(np.array(boxes, dtype=np.int64).reshape(-1, 4), Place(0, x, y, side))
    wanted = [
        (left - x, top - y, w, h)
        for left, top, w, h in boxes
        if all(x <= px < x + side for px in range(left, left + w))
        and all(y <= py < y + side for py in range(top, top + h))
    ]
    assert [tuple(box) for box in found_B4.tolist()] == wanted
    assert inside_B.sum() == len(wanted)


@given(
    st.integers(10, 60),
    st.integers(10, 60),
    st.integers(4, 10),
    st.integers(1, 10),
    st.integers(0, 50),
    st.integers(0, 2**32 - 1),
)
def test_regions_contain_a_labeled_patch(width: int, height: int, side: int, stride: int, more: int, seed: int) -> None:
    images = Sized([(width, height)], side, min(stride, side))
    region = side + more
    for place in draw_regions(images, 20, region, np.random.default_rng(seed)):
        assert place.side == region
        assert boxes_inside(images.boxes[0], place)[1].any()


def test_a_pixel_is_equally_likely_at_every_place_of_a_square() -> None:
    images = Sized([(16, 16)], 8, 4)
    places = draw_squares(images, 16000, 32, np.random.default_rng(0))
    mark_HW = np.zeros((16, 16), np.uint8)
    mark_HW[5, 11] = 1
    # A view is flipped at random.
    share_HW = np.mean([cut(mark_HW, place) for place in places], axis=0)
    share_HW = (share_HW + share_HW[::-1] + share_HW[:, ::-1] + share_HW[::-1, ::-1]) / 4
    np.testing.assert_allclose(share_HW, 1 / 16**2, atol=0.0012)


def test_regions_lie_inside_images_that_are_large_enough() -> None:
    """With mirrored parts, a training step of the classifier would contain fewer different pixels."""
    images = Sized([(37, 29), (20, 50)], 8, 4)
    corners: dict[int, set[tuple[int, int]]] = {0: set(), 1: set()}
    for index, x, y, _ in draw_regions(images, 4000, 24, np.random.default_rng(0)):
        corners[index].add((x, y))
    # Regions are moved to contain a patch, but all of these do.
    assert corners[0] == {(x, y) for x in range(37 - 24 + 1) for y in range(29 - 24 + 1)}
    assert {y for _, y in corners[1]} == set(range(50 - 24 + 1))
    assert min(x for x, _ in corners[1]) < 0  # an image of 20 px is narrower than a region of 24 px


def test_regions_reach_every_pixel() -> None:
    images = Sized([(37, 29), (20, 50)], 8, 4)
    seen = [np.zeros((29, 37), int), np.zeros((50, 20), int)]
    for index, x, y, side in draw_regions(images, 3000, 24, np.random.default_rng(0)):
        seen[index][max(0, y) : y + side, max(0, x) : x + side] += 1
    assert all(count_HW.min() > 0 for count_HW in seen)


def test_images_are_drawn_in_proportion_to_their_area_at_least_one_view() -> None:
    images = Sized([(40, 60), (30, 20), (10, 10)], 8, 4)
    drawn = [place.image for place in draw_regions(images, 8000, 20, np.random.default_rng(1))]
    share = np.bincount(drawn) / len(drawn)
    np.testing.assert_allclose(share, np.array([2400, 600, 400]) / 3400, atol=0.02)


def test_all_labeled_patches_are_drawn_equally_often() -> None:
    images = Sized([(24, 16), (8, 8), (12, 8)], 8, 4)
    places = draw_patches(images, 6000, np.random.default_rng(2))
    drawn = {place: places.count(place) for place in set(places)}
    every = {Place(n, int(x), int(y), 8) for n, boxes_B4 in enumerate(images.boxes) for x, y, _, _ in boxes_B4.tolist()}
    assert set(drawn) == every
    np.testing.assert_allclose(np.array(list(drawn.values())) / 6000, 1 / len(every), atol=0.015)


def test_images_and_boxes_have_the_pixel_size_of_the_model(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (48, 40)}, side=16, stride=8, mpp=2.0)
    whole_HWC = read_rgb(images.samples[0]).astype(float)
    averaged_HWC = whole_HWC.reshape(20, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(images.rgb(0) - averaged_HWC).max() <= 1  # Pillow rounds rows, then columns
    np.testing.assert_array_equal(images.boxes[0], grid(24, 20, 8, 4))
    assert images.pixels() == 24 * 20


@pytest.mark.parametrize("mpp", [1.3, 1.9, 2.7, 3.3, 0.7])
def test_at_any_pixel_size_boxes_are_equal_and_inside_their_image(tmp_path: Path, mpp: float) -> None:
    sizes = {f"{n}": (94 + n, 72 + 3 * n) for n in range(8)}
    images = crops(tmp_path, sizes, side=36, stride=11, mpp=mpp)
    assert len({tuple(box) for boxes_B4 in images.boxes for box in boxes_B4[:, 2:].tolist()}) == 1
    for index in range(len(images)):
        height, width = images.rgb(index).shape[:2]
        ends_B2 = images.boxes[index][:, :2] + images.boxes[index][:, 2:]
        assert (images.boxes[index] >= 0).all()
        assert (ends_B2 <= (width, height)).all()


def test_a_pixel_size_within_the_tolerance_changes_neither_image_nor_boxes(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (200, 160)}, side=32, stride=16, mpp=1.01)
    assert images.rgb(0).shape == (160, 200, 3)
    np.testing.assert_array_equal(images.boxes[0], grid(200, 160, 32, 16))


def test_decoded_images_are_cached_up_to_the_limit(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (20, 20), "b": (20, 20)}, cache_bytes=20 * 20 * 3)
    first, second = images.rgb(0).copy(), images.rgb(1).copy()
    for sample in images.samples:
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(sample.image)
    np.testing.assert_array_equal(images.rgb(0), first)
    assert second.any()
    assert not images.rgb(1).any()


def test_the_frequency_of_a_class_is_its_share_of_all_labeled_patches(tmp_path: Path) -> None:
    images = crops(tmp_path, {"a": (48, 16), "b": (16, 16)}, side=16, stride=16)
    # In a, each band fills one patch. In b, the only patch contains all three bands.
    np.testing.assert_allclose(images.class_frequency(), [0.5, 0.5, 0.5])
    assert images.pixels() == 48 * 16 + 16 * 16
    np.testing.assert_array_equal(images.rgb(0), resampled(read_rgb(images.samples[0]), 1.0))
