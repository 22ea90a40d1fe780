"""Which patches of a slide are asked about, and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.labeling.events import Place
from pipeline.labeling.patches import MIN_TISSUE, SlidePatches, round_robin, shuffled
from tests.pipeline.labeling.desks import SIDE, damage, label_slide
from tests.slides import write_slide
from wsi.errors import SlideReadError
from wsi.slide import open_slide
from wsi.tissue import find_tissue


def test_patches_lie_on_tissue_inside_the_slide_and_do_not_overlap(slides: list[Path]) -> None:
    with open_slide(slides[0]) as slide:
        tissue = find_tissue(slide)
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        found = {(place.x_l0, place.y_l0) for place in patches.on_tissue(tissue)}
    expected = set()
    for y in range(0, 832 - SIDE + 1, SIDE):
        for x in range(0, 1280 - SIDE + 1, SIDE):
            # Slow and simple: the mask at the center of every pixel.
            rows, columns = ((np.arange(start, start + SIDE) + 0.5) / tissue.l0_per_px for start in (y, x))
            inside = tissue.mask_HW[np.ix_(rows.astype(int), columns.astype(int))]
            if inside.mean() >= MIN_TISSUE:
                expected.add((float(x), float(y)))
    assert found == expected
    assert len(found) > 100


def test_a_patch_has_the_slide_s_pixels_and_lies_in_the_middle_of_its_context(slides: list[Path]) -> None:
    with open_slide(slides[0]) as slide:
        whole = slide.read(0, slide.info.bounds_l0).rgb_HWC
        patches = SlidePatches(slide, "d", 2.0, 32)
        place = patches.place(5, 4)
        assert (place.x_l0, place.y_l0, patches.side_l0) == (320.0, 256.0, 64.0)
        patch, context = patches.pixels(place), patches.context(place)
    mean = whole[256:320, 320:384].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.array_equal(patch, np.floor(mean + 0.5).astype(np.uint8))
    assert context.shape == (64, 64, 3)
    assert np.array_equal(context[16:48, 16:48], patch)


def test_the_context_of_a_patch_at_the_corner_is_white_outside_the_slide(slides: list[Path]) -> None:
    with open_slide(slides[0]) as slide:
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        context = patches.context(patches.place(0, 0))
    assert (context[:32] == 255).all()
    assert (context[:, :32] == 255).all()


def test_pixels_that_lie_only_partly_inside_the_slide_are_mirror_images_as_in_a_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image_HWC = rng.integers(60, 200, (127, 255, 3), np.uint8)  # 63.5 × 127.5 pixels of a patch
    with open_slide(write_slide(tmp_path / "a.svs", image_HWC, mpp=0.5)) as slide:
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        assert patches.cells() == (2, 1)
        patch, context = (read(patches.place(1, 0)) for read in (patches.pixels, patches.context))
        stored_HWC = slide.read(0, slide.info.bounds_l0).rgb_HWC[:126, 128:254]
    inside_HWC = np.floor(stored_HWC.reshape(63, 2, 63, 2, 3).mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(patch, np.pad(inside_HWC, ((0, 1), (0, 1), (0, 0)), mode="symmetric"))
    assert np.array_equal(context[32:96, 32:96], patch)
    assert (context[96:] == 255).all()
    assert (context[:, 96:] == 255).all()


def test_a_patch_with_unreadable_pixels_is_an_error(tmp_path: Path) -> None:
    with open_slide(damage(label_slide(tmp_path / "a.svs"), 0, 0)) as slide:
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        assert patches.pixels(patches.place(4, 4)).shape == (SIDE, SIDE, 3)
        for place in (patches.place(0, 1), patches.place(1, 1)):
            for read in (patches.pixels, patches.context):
                with pytest.raises(SlideReadError, match=r"a\.svs: pixels at \(\d+, \d+\) cannot be read"):
                    read(place)


def test_unreadable_pixels_around_a_patch_are_white(tmp_path: Path) -> None:
    path = label_slide(tmp_path / "a.svs")
    with open_slide(path) as slide:
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        whole = patches.context(patches.place(9, 6))
    with open_slide(damage(path, 4 * 128, 2 * 128)) as slide:
        patches = SlidePatches(slide, "d", 1.0, SIDE)
        # The damaged tile covers columns 8 and 9, rows 4 and 5.
        context = patches.context(patches.place(9, 6))
        readable = [patches.place(x, y) for x in range(7, 11) for y in range(3, 7) if not (x in (8, 9) and y in (4, 5))]
        for place in readable:
            assert np.array_equal(patches.context(place)[32:96, 32:96], patches.pixels(place))
    assert (context[:32, :96] == 255).all()
    assert np.array_equal(context[32:96, 32:96], whole[32:96, 32:96])


@given(st.lists(st.integers(0, 200), max_size=30, unique=True), st.integers(0, 9))
def test_the_order_is_fixed_by_the_seed_and_a_missing_patch_does_not_move_the_others(xs: list[int], seed: int) -> None:
    places = [Place("d", float(x), 0.0, 64, 1.0) for x in xs]
    order = shuffled(places, seed)
    assert sorted(order, key=repr) == sorted(places, key=repr)
    assert shuffled(reversed(places), seed) == order
    assert shuffled(places[1:], seed) == [place for place in order if place not in places[:1]]


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=5))
def test_slides_take_turns(slides: list[list[int]]) -> None:
    turns = [one[turn] for turn in range(5) for one in slides if turn < len(one)]
    assert list(round_robin(slides)) == turns
