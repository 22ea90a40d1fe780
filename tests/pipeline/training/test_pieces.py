"""Images of one tissue: tiles of one color are joined, and windows are cut out of images with drawn masks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DatasetFileError, LabelError
from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.dataset_sections import Cut, CutTissue
from pipeline.training.pieces import cut_windows, joined_pieces, kinds_of, pieces_of, rectangles
from pipeline.training.splits import hash_split
from tests.pipeline.training.single_tissue import COLORS, TILE, TOML, write_other, write_tiles


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiles(tmp_path_factory.mktemp("tiles"))


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_rectangles_partition_the_places_and_their_rows_are_neighbors(cells: set[tuple[int, int]]) -> None:
    places = {(5 + 20 * x, 3 + 10 * y) for x, y in cells}
    found = rectangles(places, 20, 10)
    listed = [place for rectangle in found for line in rectangle for place in line]
    assert sorted(listed) == sorted(places)
    for rectangle in found:
        x, y = rectangle[0][0]
        assert rectangle == [
            [(x + 20 * column, y + 10 * row) for column in range(len(rectangle[0]))] for row in range(len(rectangle))
        ]


def test_neighbors_of_one_source_and_tissue_are_joined(tiles: Dataset) -> None:
    pieces = joined_pieces(tiles, "train")
    assert {kind: [(piece.slide, piece.rgb_HWC.shape) for piece in own] for kind, own in pieces.items()} == {
        kind: [("1", (32, 48, 3)), ("2", (32, 48, 3))] for kind in (("a",), ("b",), ("a", "b"))
    }
    assert pieces["a", "b"][0].rgb_HWC.reshape(-1, 3).max(axis=0).tolist() == list(COLORS["AB"])


def test_pieces_have_the_pixel_size_of_the_composed_images(tiles: Dataset) -> None:
    rule = tiles.card.compose
    assert rule is not None
    coarse = tiles.card.model_copy(update={"compose": rule.model_copy(update={"mpp": 1.0})})
    pieces = joined_pieces(Dataset(coarse, tiles.root), "val")
    assert [piece.rgb_HWC.shape for piece in pieces["a",]] == [(16, 24, 3)]


def test_the_tissues_are_every_class_and_every_group_of_classes(tiles: Dataset) -> None:
    assert kinds_of(tiles) == (("a",), ("b",), ("glass",), ("a", "b"))


def test_a_position_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    dataset = write_tiles(tmp_path, position="column {}")
    with pytest.raises(LabelError, match=r"A-1-0\.png: its position in the table is 'column 1'"):
        joined_pieces(dataset, "train")


@pytest.mark.parametrize(
    ("key", "columns"), [('source = "sauce"', "sauce"), ('source = "source"\nx = "X"\ny = "Y"', "X, Y")]
)
def test_the_error_names_a_missing_column(tmp_path: Path, key: str, columns: str) -> None:
    write_tiles(tmp_path)
    (tmp_path / "dataset.toml").write_text(TOML.replace('source = "source"', key))
    with pytest.raises(LabelError, match=rf"the table has no column {columns} \(source, x or y .* are name, slide"):
        joined_pieces(load_dataset(tmp_path), "train")


def test_an_image_without_a_source_is_a_piece_of_its_own(tmp_path: Path) -> None:
    write_tiles(tmp_path)
    table = tmp_path / "meta.csv"
    table.write_text(table.read_text().replace("A/A-1-0.png,1,s1", "A/A-1-0.png,1,"))
    pieces = joined_pieces(load_dataset(tmp_path), "train")["a",]
    found = sorted(piece.rgb_HWC.shape[:2] for piece in pieces if piece.slide == "1")
    assert found == [(16, 16), (16, 16), (32, 32)]


def add_tile(folder: Path, name: str, x: int, y: int, size: tuple[int, int] = (TILE, TILE)) -> None:
    Image.new("RGB", size, (9, 9, 9)).save(folder / name)
    with (folder / "meta.csv").open("a", newline="") as stream:
        csv.writer(stream).writerow([name, "1", "s1", x, y])


def test_the_error_names_a_tile_of_another_size(tmp_path: Path) -> None:
    dataset = write_tiles(tmp_path)
    add_tile(tmp_path, "A/A-edge.png", 1 + 3 * TILE, 1, (TILE, TILE // 2))
    with pytest.raises(DatasetFileError, match=r"A-edge\.png: is 16x8 px, but .*A-1-0\.png, .* is 16x16 px"):
        joined_pieces(dataset, "train")


def test_two_tiles_at_one_position_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write_tiles(tmp_path)
    joined_pieces(dataset, "train")
    assert not caplog.messages
    add_tile(tmp_path, "A/A-twice.png", 1, 1)
    joined_pieces(dataset, "train")
    (message,) = caplog.messages
    assert "tiles: 1 images are not used" in message
    assert "A-1-0.png by " in message


def test_the_error_names_a_tile_without_a_class(tmp_path: Path) -> None:
    write_tiles(tmp_path)
    toml = TOML.replace('"folders"\nfolders = { A = "a", B = "b", AB = ["a", "b"] }', '"csv"\nlist_column = "tissue"')
    (tmp_path / "dataset.toml").write_text(toml)
    rows = (tmp_path / "meta.csv").read_text().splitlines()
    labels = ["tissue", *("" if "B-2-3" in row else "a" for row in rows[1:])]
    (tmp_path / "meta.csv").write_text("\n".join(f"{row},{label}" for row, label in zip(rows, labels, strict=True)))
    with pytest.raises(LabelError, match=r"B-2-3\.png: has no class, so compose cannot use it"):
        joined_pieces(load_dataset(tmp_path), "train")


TISSUE = CutTissue(classes=("a",), mask="gland", share=(0.9, 1.0), bright=0.25, sides=(64, 32))


def cut_rule(*tissues: CutTissue, folder: str = "other", **changes: Any) -> Cut:
    return Cut(dataset="ebhi-seg", folder=folder, column="gland_class", tissues=tissues, step=8, **changes)


def windows(
    inside_HW: NDArray[np.bool_], bright_HW: NDArray[np.bool_] | None = None, tissue: CutTissue = TISSUE
) -> list[tuple[int, int, int]]:
    """Return x, y and side of the windows."""
    bright_HW = np.zeros_like(inside_HW) if bright_HW is None else bright_HW
    used_HW = np.zeros_like(inside_HW)
    found = list(cut_windows(inside_HW, bright_HW, used_HW, tissue, cut_rule(tissue)))
    return [(columns.start, rows.start, rows.stop - rows.start) for rows, columns in found]


def test_the_largest_windows_come_first_and_smaller_ones_fill_what_is_left() -> None:
    inside_HW = np.zeros((96, 128), bool)
    inside_HW[:64, :104] = True
    assert windows(inside_HW) == [(0, 0, 64), (64, 0, 32), (64, 32, 32)]


def test_a_window_with_too_many_bright_pixels_is_not_cut() -> None:
    inside_HW = np.ones((64, 64), bool)
    bright_HW = np.zeros_like(inside_HW)
    bright_HW[:, 32:48] = True  # a quarter of the large window, half of each right one
    assert windows(inside_HW, bright_HW) == [(0, 0, 64)]
    bright_HW[:, 48] = True
    assert windows(inside_HW, bright_HW) == [(0, 0, 32), (0, 32, 32)]


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9))
def test_windows_keep_to_their_shares_and_never_overlap(seed: int, least: float) -> None:
    rng = np.random.default_rng(seed)
    inside_HW, bright_HW = (np.kron(rng.random((5, 6)) < share, np.ones((16, 16), bool)) for share in (0.7, 0.2))
    tissue = TISSUE.model_copy(update={"share": (least, 0.95)})
    covered_HW = np.zeros(inside_HW.shape, int)
    for x, y, side in windows(inside_HW, bright_HW, tissue):
        window = np.s_[y : y + side, x : x + side]
        covered_HW[window] += 1
        assert least <= inside_HW[window].mean() <= 0.95
        assert bright_HW[window].mean() <= 0.25
    assert covered_HW.max() <= 1


def with_cuts(tiles: Dataset, *rules: Cut) -> Dataset:
    compose = tiles.card.compose
    assert compose is not None
    card = tiles.card.model_copy(update={"compose": compose.model_copy(update={"cut": rules})})
    return Dataset(card, tiles.root)


TUMOR = TISSUE.model_copy(update={"values": ("adenocarcinoma",)})
OTHER = CutTissue(classes=("b", "a"), mask="gland", share=(0.0, 0.0), bright=0.0, sides=(64,))


def test_windows_of_another_data_set_join_the_tiles_of_the_same_split(tiles: Dataset, tmp_path: Path) -> None:
    values = {f"case-{n}": "adenocarcinoma" if n % 2 else "normal" for n in range(40)}
    write_other(tmp_path, values)
    dataset = with_cuts(tiles, cut_rule(TUMOR, OTHER, folder=str(tmp_path), slides=3))
    own, train, val = pieces_of(tiles, "train"), pieces_of(dataset, "train"), pieces_of(dataset, "val")
    splits = {name: hash_split(name, 0.70, 0.15) for name in values}
    for kind, color, allowed in (
        (("a",), (200, 0, 0), {"adenocarcinoma"}),
        (("a", "b"), (0, 0, 200), {*values.values()}),
    ):
        cut = {
            split: [piece for piece in pieces[kind] if piece.slide.startswith("ebhi-seg ")]
            for split, pieces in (("train", train), ("val", val))
        }
        assert len(train[kind]) == len(own[kind]) + len(cut["train"])
        for split, found in cut.items():
            assert len(found) == sum(splits[name] == split for name, value in values.items() if value in allowed) > 0
        for piece in cut["train"] + cut["val"]:
            assert piece.rgb_HWC.shape == (128, 128, 3)  # 64 px of 1.0 um in composed images of 0.5 um
            assert (piece.rgb_HWC == color).all()
    assert len(train["b",]) == len(own["b",])
    slides = {piece.slide for pieces in train.values() for piece in pieces}
    assert slides == {"1", "2", "ebhi-seg 0", "ebhi-seg 1", "ebhi-seg 2"}


def test_a_tissue_without_a_training_window_is_an_error(tiles: Dataset, tmp_path: Path) -> None:
    write_other(tmp_path, {f"case-{n}": "adenocarcinoma" for n in range(9)})
    misspelled = TISSUE.model_copy(update={"values": ("adenocarcinom",), "classes": ("b",)})
    dataset = with_cuts(tiles, cut_rule(TUMOR, misspelled, folder=str(tmp_path)))
    with pytest.raises(DatasetFileError, match=r"no training window for each tissue in ebhi-seg \(\d of a, 0 of b\)"):
        pieces_of(dataset, "train")


def test_an_image_without_a_value_is_an_error(tiles: Dataset, tmp_path: Path) -> None:
    write_other(tmp_path, {f"case-{n}": "" for n in range(9)})
    with pytest.raises(LabelError, match=r"case-\d\.png: the table has no gland_class for this image"):
        pieces_of(with_cuts(tiles, cut_rule(TUMOR, folder=str(tmp_path))), "train")


def test_a_data_set_that_does_not_fit_is_refused(tiles: Dataset, tmp_path: Path) -> None:
    write_other(tmp_path, {"one": ""})
    strange = cut_rule(TISSUE.model_copy(update={"mask": "tumor"}), folder=str(tmp_path))
    with pytest.raises(DatasetFileError, match=r"names the masks tumor; the classes of ebhi-seg are other, gland"):
        pieces_of(with_cuts(tiles, strange), "train")
    with pytest.raises(
        DatasetFileError, match=r"compose\.cut needs the data set ebhi-seg in .*absent; the folder must"
    ):
        pieces_of(with_cuts(tiles, cut_rule(TISSUE, folder="absent")), "train")
    luad = cut_rule(TISSUE.model_copy(update={"mask": "TE"}), folder=str(tmp_path)).model_copy(
        update={"dataset": "luad-histoseg"}
    )
    with pytest.raises(DatasetFileError, match=r"luad-histoseg: compose\.cut needs a data set with a \[table\]"):
        pieces_of(with_cuts(tiles, luad), "train")
