"""Splits and groups of data sets: tables, folders and hashes, and the errors for broken ones."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from pathlib import Path
from typing import Literal

import pytest

from pipeline.errors import (
    LabelError,
    MissingImagesError,
)
from pipeline.training.dataset import (
    Dataset,
    load_dataset,
    samples,
)
from pipeline.training.dataset_sections import SPLITS
from pipeline.training.splits import MOST_TABLE_BYTES, log_once
from tests.pipeline.training.tiny_datasets import (
    CROP_LABELS,
    HEAD,
    TABLE_LABELS,
    image,
    names,
    put,
    table,
)


def test_a_table_provides_labels_groups_and_splits(tmp_path: Path) -> None:
    for name in "abcde":
        image(tmp_path / "img" / f"{name}.png")
    # Names with and without extension, a byte order mark, and an unused row without an image.
    table(
        tmp_path,
        ["b.png,p2,train,0,1", "a,p1,train,1,0", "c,p2,testA,1,1", "d,p3,testB,0,1", "e,p3,train,1,1", "z,,,,"],
    )
    content = (tmp_path / "meta.csv").read_text(encoding="utf-8")
    (tmp_path / "meta.csv").write_text(content, encoding="utf-8-sig")
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))

    assert names(samples(dataset, "train")) == ["a", "e"]
    assert names(samples(dataset, "val")) == ["b"]
    assert names(samples(dataset, "test")) == ["c", "d"]
    assert [sample.group for sample in samples(dataset, "test")] == ["p2", "p3"]
    assert [sample.labels_K for sample in samples(dataset, "train")] == [(True, False), (True, True)]
    assert dataset.card.splits == ("train", "val", "test")


def test_spaces_around_a_group_or_split_of_a_table_do_not_count(tmp_path: Path) -> None:
    for name in "abc":
        image(tmp_path / "img" / f"{name}.png")
    table(tmp_path, ["a,p1 ,train ,1,0", "b, p2,train,0,1", "c,p2 , train,0,1"])
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))

    assert [(one.name, one.group) for one in samples(dataset, "train")] == [("a", "p1")]
    assert [(one.name, one.group) for one in samples(dataset, "val")] == [("b", "p2"), ("c", "p2")]


def test_the_row_of_a_path_is_not_that_of_another_folders_image(tmp_path: Path) -> None:
    image(tmp_path / "img" / "a.png")
    for name in "bc":
        image(tmp_path / "img" / f"{name}.png")
    table(tmp_path, ["img/a.png,p1,train,1,0", "a.png,p9,testA,0,1", "b,p2,train,0,1", "c,p3,testA,0,1"])
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))
    assert [(one.name, one.group) for one in samples(dataset, "train")] == [("a", "p1")]


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("entry", ["größe", "größe.png", "img/größe.png"])
def test_the_row_of_an_image_may_have_umlauts_of_another_form(
    tmp_path: Path, in_table: Literal["NFC", "NFD"], on_disk: Literal["NFC", "NFD"], entry: str
) -> None:
    image(tmp_path / "img" / unicodedata.normalize(on_disk, "größe.png"))
    image(tmp_path / "img" / "b.png")
    table(tmp_path, [unicodedata.normalize(in_table, f"{entry},p1,train,1,0"), "b,p2,train,0,1"])
    (only,) = samples(load_dataset(put(tmp_path, HEAD + TABLE_LABELS)), "train")
    assert (only.name, only.group) == (unicodedata.normalize(on_disk, "größe"), "p1")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_umlauts_in_the_pattern_of_masks_match_files_of_a_mac(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    folder = tmp_path / unicodedata.normalize(form, "Köln")
    image(folder / "a.png")
    image(folder / "masks" / "a.png")
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    mask = unicodedata.normalize(other, "Köln/masks/{name}.png")
    text = CROP_LABELS.replace("img/*.png", "*/*.png").replace("mask/{name}.png", mask)
    (only,) = samples(load_dataset(put(tmp_path, HEAD + text)), "train")
    assert only.mask == folder / "masks" / "a.png"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_umlauts_in_a_pattern_match_files_of_a_mac(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    for name in "ab":
        image(tmp_path / unicodedata.normalize(form, "Köln") / f"{name}.png")
    for pattern in ("NFC", "NFD"):
        text = TABLE_LABELS.replace('"img/*.png"', f'"{unicodedata.normalize(pattern, "Köln")}/*.png"')
        table(tmp_path, ["a,p1,train,1,0", "b,p2,train,0,1"])
        assert names(samples(load_dataset(put(tmp_path, HEAD + text)), "train")) == ["a"]


def test_a_warning_counts_the_rows_without_an_image_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        image(tmp_path / "img" / f"{name}.png")
    rows = ["a,p1,train,1,0", "d.jpg,p1,train,0,1", "b,p2,train,1,0", "e.jpg,p4,testA,1,0", "c,p3,testA,1,0"]
    table(tmp_path, rows)
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))
    for split in SPLITS:
        assert len(samples(dataset, split)) == 1
    (message,) = caplog.messages
    assert message.startswith(f"2 of 5 rows of {tmp_path / 'meta.csv'} have no image (such as d.jpg); ")


def test_rows_of_images_that_no_pattern_matches_are_counted_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("img/a", "img/b", "img/c", "other/d"):
        image(tmp_path / f"{name}.png")
    rows = ["img/a.png,p1,train,1,0", "img/b.png,p2,train,1,0", "img/c.png,p3,testA,1,0", "other/d.png,p4,train,0,1"]
    table(tmp_path, rows)
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))
    assert [len(samples(dataset, split)) for split in ("train", "val")] == [1, 1]
    ((level, message),) = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert level == "INFO"
    assert message == (
        f"1 of 4 rows of {tmp_path / 'meta.csv'} belong to images that the patterns in [images] leave out (such as "
        "other/d.png)"
    )


def test_rows_of_images_of_other_splits_cause_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a", "train/b", "val/c"):
        image(tmp_path / f"{name}.png")
    table(tmp_path, ["a,1,0", "b,0,1", "c,1,0"], header="name,red,blue")
    splits = """
[images]
train = [{ image = "train/*.png" }]
val = [{ image = "val/*.png" }]
[table]
files = ["meta.csv"]
[labels]
source = "csv"
"""
    dataset = load_dataset(put(tmp_path, HEAD + splits))
    assert [len(samples(dataset, split)) for split in dataset.card.splits] == [2, 1]
    assert not caplog.messages


def test_class_folders_are_split_by_a_hash_of_the_group_in_the_name(tmp_path: Path) -> None:
    for patient in range(40):
        image(tmp_path / ("red" if patient % 2 else "blue") / f"P{patient}-0.png")
        image(tmp_path / "blue" / f"P{patient}-1.png")
    rest = """
[images]
all = [{ image = "*/*.png" }]
[group]
pattern = "^(P[0-9]+)-"
[split]
by = "hash"
train = 0.5
val = 0.25
[labels]
source = "folders"
"""
    dataset = load_dataset(put(tmp_path, HEAD + rest))

    groups = []
    for split, (low, high) in zip(SPLITS, ((0.0, 0.5), (0.5, 0.75), (0.75, 1.0)), strict=True):
        chosen = samples(dataset, split)
        expected = {
            f"P{p}"
            for p in range(40)
            if low <= int(hashlib.sha256(f"P{p}".encode()).hexdigest()[:8], 16) / 2**32 < high
        }
        assert {sample.group for sample in chosen} == expected
        assert len(chosen) == 2 * len(expected)
        assert all(
            sample.labels_K == ((True, False) if sample.image.parent.name == "red" else (False, True))
            for sample in chosen
        )
        groups.append(expected)
    assert all(groups)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    image(tmp_path / "img" / "a.png")
    image(tmp_path / "img" / "b.png")
    table(tmp_path, ["a,p1,train,1,0", "b,p2,train,1,0"])
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))

    with pytest.raises(MissingImagesError, match=r"tiny: split test has no images \(1 in train, 1 in val\)"):
        samples(dataset, "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,p1,train,1,0"], r"b\.png: has no row in meta\.csv \(column name\)"),
        (["a,p1,train,1,0", "b,p2,train,1,0", "a,p2,train,1,0"], r"meta\.csv: a has two rows"),
        (
            ["a,p1,train,1,0", "b,p2,train,1,0", "a.png,p2,train,1,0"],
            r"a\.png: has several rows in meta\.csv, a and a\.png \(column name\); keep one",
        ),
        (
            ["a,p1,train,1,0", "img/b.png,p2,train,1,0", "b,p2,train,1,0"],
            r"b\.png: has several rows .*b and img/b\.png",
        ),
        (["a,p1,train,1,0", "b,p2,train,1,"], r"b\.png: column blue of the table contains ''"),
        (
            ["a,p1,train,1,0", "b,p2,learn,1,0"],
            r"b\.png: column split contains learn, but \[split\] lists only train, testA",
        ),
        (["a,p1,train,1,0", "b,,train,1,0"], r"b\.png: the table has no patient for this image"),
        (["a,p1,train,1,0", "b, ,train,1,0"], r"b\.png: the table has no patient for this image"),
        (["a,p1,train,1,0", "b,p1,train,1,0"], r"val_groups lists p2, but no training image belongs to it"),
        (["a,p1,train,1,0", "b,p2,train,1,0,1"], r"meta\.csv: the row of b has more cells than the header"),
    ],
)
def test_a_table_that_does_not_fit_the_images_is_an_error(tmp_path: Path, rows: list[str], message: str) -> None:
    image(tmp_path / "img" / "a.png")
    image(tmp_path / "img" / "b.png")
    table(tmp_path, rows)
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))

    with pytest.raises(LabelError, match=message):
        samples(dataset, "val")


def test_a_group_in_several_splits_of_a_table_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcd":
        image(tmp_path / "img" / f"{name}.png")
    table(tmp_path, ["a,p1,train,1,0", "b,p1,valid,0,1", "c,p2,train,1,0", "d,p2,testA,1,0"])
    toml = TABLE_LABELS.replace("val = []", 'val = ["valid"]')
    dataset = load_dataset(put(tmp_path, HEAD + toml.replace('val_groups = ["p2"]', "")))

    assert names(samples(dataset, "train")) == ["a", "c"]
    assert not caplog.messages
    log_once.cache_clear()
    for _ in range(3):  # a command reads the samples several times
        assert names(samples(dataset, "val")) == ["b"]
    assert names(samples(dataset, "test")) == ["d"]
    val, test = caplog.messages
    assert "tiny: 1 group(s) of split val (p1) also have images in another split" in val
    assert "tiny: 1 group(s) of split test (p2) also have images in another split" in test

    caplog.clear()
    dataset = load_dataset(put(tmp_path, HEAD + toml.replace('["p2"]', '["p1"]')))
    assert names(samples(dataset, "val")) == ["a", "b"]
    assert not caplog.messages


def test_a_table_that_is_unreadable_or_has_wrong_columns_is_an_error(tmp_path: Path) -> None:
    image(tmp_path / "img" / "a.png")
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))

    with pytest.raises(LabelError, match=r"meta\.csv: the table cannot be read"):
        samples(dataset, "train")
    table(tmp_path, [], header="file,split")
    with pytest.raises(LabelError, match=r"meta\.csv: has no column name; the columns are file, split"):
        samples(dataset, "train")
    table(tmp_path, ["a,p1,train,1,0,0"], header="name,patient,split,red,blue,red")
    with pytest.raises(LabelError, match=r"meta\.csv: has several columns red; rename or delete all but one of each"):
        samples(dataset, "train")


def test_the_error_names_the_file_that_the_group_pattern_does_not_match(tmp_path: Path) -> None:
    image(tmp_path / "img" / "Q1.png")
    rest = TABLE_LABELS.replace('column = "patient"', "pattern = '^(P[0-9]+)'")
    table(tmp_path, ["Q1,p1,train,1,0"])

    with pytest.raises(LabelError, match=r"Q1\.png: the group pattern '\^\(P\[0-9\]\+\)' does not match"):
        samples(load_dataset(put(tmp_path, HEAD + rest)), "train")


def test_a_table_that_is_not_a_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    """To open a pipe would wait forever, and a device such as /dev/zero has no end."""
    image(tmp_path / "img" / "a.png")
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))
    os.mkfifo(tmp_path / "meta.csv")
    with pytest.raises(LabelError, match=r"meta\.csv: is not a file of at most 256 MiB; use a CSV file"):
        samples(dataset, "train")
    (tmp_path / "meta.csv").unlink()
    table(tmp_path, [])
    os.truncate(tmp_path / "meta.csv", MOST_TABLE_BYTES + 1)
    with pytest.raises(LabelError, match=r"meta\.csv: is not a file of at most 256 MiB"):
        samples(dataset, "train")


def test_an_error_shows_only_the_beginning_of_many_columns(tmp_path: Path) -> None:
    image(tmp_path / "img" / "a.png")
    dataset = load_dataset(put(tmp_path, HEAD + TABLE_LABELS))
    table(tmp_path, [], header=",".join(f"column{number}" for number in range(1000)))
    with pytest.raises(LabelError, match=r"the columns are column0, column1, .*…$") as raised:
        samples(dataset, "train")
    assert len(str(raised.value)) < len(str(tmp_path)) + 300


def test_an_empty_split_of_few_groups_names_their_number_and_the_alternatives(tmp_path: Path) -> None:
    for name in ("P1-a", "P2-a"):
        image(tmp_path / "red" / f"{name}.png")
    rest = (
        '[images]\nall = [{ image = "*/*.png" }]\n[group]\npattern = "^(P[0-9]+)-"\n[split]\nby = "hash"\n'
        'train = 0.99\nval = 0.005\n[labels]\nsource = "folders"\n'
    )
    with pytest.raises(MissingImagesError, match=r"\(2 in train\); a hash assigns each of the 2 group\(s\).*by = "):
        samples(load_dataset(put(tmp_path, HEAD + rest)), "val")


def table_dataset(folder: Path, content: bytes) -> Dataset:
    image(folder / "img" / "ä.png")
    (folder / "meta.csv").write_bytes(content)
    return load_dataset(put(folder, HEAD + TABLE_LABELS.replace('val_groups = ["p2"]\n', "")))


def test_rows_of_empty_cells_are_left_out(tmp_path: Path) -> None:
    content = "name,patient,split,red,blue\r\nä,p1,train,1,0\r\n,,,,\r\n , ,,,\r\n"
    assert len(samples(table_dataset(tmp_path, content.encode("utf-8-sig")), "train")) == 1


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_error_for_another_encoding_names_the_format_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    dataset = table_dataset(tmp_path, "name,patient,split,red,blue\r\nä,p1,train,1,0\r\n".encode(encoding))
    with pytest.raises(LabelError, match=r"meta\.csv: the table is not UTF-8; in the spreadsheet, save it as"):
        samples(dataset, "train")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_the_error_for_another_separator_asks_for_commas(tmp_path: Path, separator: str) -> None:
    content = "name,patient,split,red,blue\nä,p1,train,1,0\n".replace(",", separator)
    with pytest.raises(LabelError, match=r"has no column name; .*; separate the columns with commas"):
        samples(table_dataset(tmp_path, content.encode()), "train")
