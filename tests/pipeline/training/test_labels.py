"""Presence labels from file names, table rows, folders and crops of masks."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LabelError
from pipeline.training.dataset_sections import CsvLabels, FileNameLabels, FolderLabels
from pipeline.training.labels import crop_boxes, labels_of_folder, labels_of_name, labels_of_row, presence

FILE_NAME = FileNameLabels(source="file-name")
NAMES = ("tumor", "stroma", "necrosis")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("1031280-2300-27920-[1 0 0 1].png", (True, False, False, True)),
        ("TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+0[1101].png", (True, True, False, True)),
        ("a[0000].png", (False, False, False, False)),
        ("a[0, 1, 0, 0].png", (False, True, False, False)),
        # Only the last brackets contain the label.
        ("[1111]-b-[0010].png", (False, False, True, False)),
    ],
)
def test_one_expression_parses_both_published_forms_of_file_name(name: str, labels: tuple[bool, ...]) -> None:
    assert labels_of_name(Path(name), FILE_NAME, 4) == labels


@pytest.mark.parametrize("name", ["folder[1001]/plain.png", "a[10x1].png", "a[].png", "a[1 0 2 1].png", "a1001.png"])
def test_the_error_names_a_file_name_without_a_label(name: str) -> None:
    with pytest.raises(LabelError, match="the file name has no label") as raised:
        labels_of_name(Path(name), FILE_NAME, 4)
    assert str(raised.value).startswith(f"{Path(name)}: ")
    assert "[0000]" in str(raised.value)


@pytest.mark.parametrize("name", ["a[101].png", "a[1 0 0 1 1].png"])
def test_the_error_names_a_file_name_with_another_number_of_classes(name: str) -> None:
    with pytest.raises(LabelError, match="must be 4 digits") as raised:
        labels_of_name(Path(name), FILE_NAME, 4)
    assert name in str(raised.value)


def test_another_file_name_pattern_can_be_set() -> None:
    rule = FileNameLabels(source="file-name", pattern=r"_label(\d+)$")

    assert labels_of_name(Path("p_label011.png"), rule, 3) == (False, True, True)
    with pytest.raises(LabelError, match=r"\[012\].*must be 3 digits 0 or 1"):
        labels_of_name(Path("p_label012.png"), rule, 3)


def test_a_row_has_labels_in_columns_in_the_order_of_the_classes() -> None:
    row = {"name": "a", "necrosis": "1", "stroma": " 0 ", "tumor": "1", "t": "0", "s": "1", "n": "0"}

    assert labels_of_row(Path("a.png"), row, CsvLabels(source="csv"), NAMES) == (True, False, True)
    renamed = CsvLabels(source="csv", columns=("t", "s", "n"))
    assert labels_of_row(Path("a.png"), row, renamed, NAMES) == (False, True, False)


def test_a_row_has_labels_as_a_list_of_names() -> None:
    rule = CsvLabels(source="csv", list_column="tissue", separator="|")

    assert labels_of_row(Path("a.png"), {"tissue": "necrosis | tumor"}, rule, NAMES) == (True, False, True)
    assert labels_of_row(Path("a.png"), {"tissue": ""}, rule, NAMES) == (False, False, False)


@pytest.mark.parametrize(
    ("row", "rule", "message"),
    [
        ({"tumor": "1", "stroma": "yes", "necrosis": "0"}, CsvLabels(source="csv"), r"column stroma .* contains 'yes'"),
        ({"tumor": "1", "stroma": "0"}, CsvLabels(source="csv"), r"no column necrosis; .* tumor, stroma"),
        ({"t": "fat;tumor"}, CsvLabels(source="csv", list_column="t"), r"lists fat; .* tumor, stroma, necrosis"),
    ],
)
def test_the_error_names_the_image_of_an_invalid_row(row: dict[str, str], rule: CsvLabels, message: str) -> None:
    with pytest.raises(LabelError, match=message) as raised:
        labels_of_row(Path("img/a.png"), row, rule, NAMES)
    assert str(raised.value).startswith(str(Path("img/a.png")))


def test_the_folder_is_the_only_class_of_its_images() -> None:
    renamed = FolderLabels(source="folders", folders={"01_TUM": "tumor", "02_NEC": "necrosis"})

    own = labels_of_folder(Path("train/stroma/a.png"), FolderLabels(source="folders"), NAMES)
    assert own == (False, True, False)
    assert labels_of_folder(Path("train/02_NEC/a.png"), renamed, NAMES) == (False, False, True)
    with pytest.raises(LabelError, match=r"a.png: folder stroma has no class; .* 01_TUM, 02_NEC"):
        labels_of_folder(Path("train/stroma/a.png"), renamed, NAMES)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_the_folder_may_have_decomposed_umlauts(form: Literal["NFC", "NFD"], listed: Literal["NFC", "NFD"]) -> None:
    folder = Path("train") / unicodedata.normalize(form, "Drüse") / "a.png"
    name = unicodedata.normalize(listed, "Drüse")
    assert labels_of_folder(folder, FolderLabels(source="folders"), ("Stroma", name)) == (False, True)
    renamed = FolderLabels(source="folders", folders={name: "tumor"})
    assert labels_of_folder(folder, renamed, NAMES) == (True, False, False)


geometry = st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40)).flatmap(
    lambda size: st.tuples(*map(st.just, size), st.integers(1, size[2]))
)


@given(geometry)
def test_crops_are_inside_the_image_and_cover_every_pixel(size: tuple[int, int, int, int]) -> None:
    width, height, side, stride = size
    boxes_B4 = crop_boxes(width, height, side, stride)

    covered_HW = np.zeros((height, width), dtype=int)
    for x, y, w, h in boxes_B4:
        assert x >= 0
        assert y >= 0
        assert (w, h) == (min(side, width), min(side, height))
        assert x + w <= width
        assert y + h <= height
        covered_HW[y : y + h, x : x + w] += 1
    assert covered_HW.min() >= 1
    assert len({tuple(box) for box in boxes_B4.tolist()}) == len(boxes_B4)


@given(geometry)
def test_crops_follow_the_stride_and_include_the_last_row_and_column(size: tuple[int, int, int, int]) -> None:
    width, height, side, stride = size
    starts = {(int(x), int(y)) for x, y, _, _ in crop_boxes(width, height, side, stride)}

    # Try every pixel as a corner, slowly.
    def is_start(at: int, length: int) -> bool:
        return at == max(0, length - side) or (at % stride == 0 and at + side <= length)

    assert starts == {(x, y) for x in range(width) for y in range(height) if is_start(x, width) and is_start(y, height)}


def test_crops_of_a_glas_image_equal_the_published_ones() -> None:
    boxes_B4 = crop_boxes(775, 522, 112, 56)

    assert sorted({int(x) for x in boxes_B4[:, 0]}) == [*range(0, 617, 56), 663]
    assert sorted({int(y) for y in boxes_B4[:, 1]}) == [*range(0, 393, 56), 410]
    assert len(boxes_B4) == 13 * 9
    assert set(map(tuple, boxes_B4[:, 2:].tolist())) == {(112, 112)}


@pytest.mark.parametrize("side", [20, 40, 60, 100])
def test_a_class_is_present_if_it_covers_strictly_more_than_the_minimum(side: int) -> None:
    box_14 = np.array([[0, 0, side, side]])
    labels_HW = np.zeros((side, side), dtype=np.uint8)
    labels_HW.flat[: side * side // 20] = 1
    assert presence(labels_HW, box_14, 2, 0.05).tolist() == [[True, False]]

    labels_HW.flat[side * side // 20] = 1
    assert presence(labels_HW, box_14, 2, 0.05).tolist() == [[True, True]]


def test_an_equal_share_is_not_more_even_if_a_product_rounds_down() -> None:
    labels_HW = np.zeros((10, 10), dtype=np.uint8)
    labels_HW.flat[:29] = 1

    assert 29 > 0.29 * 100
    assert presence(labels_HW, np.array([[0, 0, 10, 10]]), 2, 0.29).tolist() == [[True, False]]


@given(geometry, st.sampled_from([0.0, 0.05, 0.25, 0.5]), st.integers(0, 2**32 - 1))
def test_presence_equals_counting_box_by_box(size: tuple[int, int, int, int], minimum: float, seed: int) -> None:
    width, height, side, stride = size
    labels_HW = np.random.default_rng(seed).choice(
        np.array([0, 1, 2, 255], dtype=np.uint8), size=(height, width), p=[0.6, 0.3, 0.05, 0.05]
    )
    boxes_B4 = crop_boxes(width, height, side, stride)

    expected = [
        [int((labels_HW[y : y + h, x : x + w] == k).sum()) / int(w * h) > minimum for k in range(3)]
        for x, y, w, h in boxes_B4
    ]
    assert presence(labels_HW, boxes_B4, 3, minimum).tolist() == expected


def test_ignored_pixels_count_toward_the_box_but_toward_no_class() -> None:
    labels_HW = np.full((10, 10), 255, dtype=np.uint8)
    labels_HW[0, :5] = 1

    assert presence(labels_HW, np.array([[0, 0, 10, 10]]), 2, 0.05).tolist() == [[False, False]]
    assert presence(labels_HW, np.array([[0, 0, 10, 5]]), 2, 0.05).tolist() == [[False, True]]
