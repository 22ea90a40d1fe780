"""The keys of a dataset.toml: errors for wrong ones, and their documentation."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.errors import DatasetFileError
from pipeline.training import dataset_card, dataset_sections
from pipeline.training.dataset import load_dataset
from pipeline.training.dataset_card import DatasetCard
from tests.pipeline.training.tiny_datasets import CROP_LABELS, HEAD, TABLE_LABELS, put
from tests.repository import REPOSITORY


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mpp = 0.5", "mpp = 0.5\nmagnification = 20", "unknown key magnification"),
        ("side = 8", "side = 8\nsidee = 8", r"unknown key labels\.sidee"),
        ("mpp = 0.5", "", "key mpp is missing"),
        (
            'name = "tiny"',
            'name = "my patches"',
            "name: 'my patches' must start with a letter or digit and contain only .* such as lung-1",
        ),
        (
            '    { name = "blue", color = [0, 0, 200], mask_values = [1, 2] },\n',
            "",
            "classes: name at least two classes, such as tumor and other",
        ),
        ("mpp = 0.5", "mpp = 0", "mpp: Input should be greater than 0"),
        ("mpp = 0.5", "mpp = inf", "mpp: Input should be"),
        ("mpp = 0.5", "mpp = 500", "mpp: Input should be less than or equal to 100"),
        ("mpp = 0.5", "mpp = ", "is not valid TOML"),
        ("[200, 0, 0]", "[300, 0, 0]", r"classes\.0\.color\.0: .* less than or equal to 255"),
        ('"blue"', '"red"', "class name red is given twice"),
        ('"blue"', '"Tumor: blue"', r"classes\.1\.name: .*class name 'Tumor: blue' must be printable, without ':'"),
        ('"blue"', '"blue\\n"', r"classes\.1\.name: .* without space around it"),
        (
            '"blue", color = [0, 0, 200], mask_values = [1, 2] },\n]',
            '"white", color = [0, 0, 200], mask_values = [1, 2] },\n]\nbackground = {}',
            r"class name white is reserved for the pixels of \[background\] in scores; choose another name",
        ),
        ("[1, 2]", "[1, 4]", "mask value 4 is given twice"),
        (", mask_values = [1, 2]", "", r"images\.train has masks, but mask_values is missing for blue"),
        (', mask = "mask/{name}.png"', "", r"images\.train needs a mask"),
        ("{name}", "a", r"images\.train\.0\.mask: 'mask/a\.png' must contain {name}"),
        ("img/*.png", "/img/*.png", r"images\.train\.0\.image: '/img/\*\.png' must be a path below root"),
        ("img/*.png", "../img/*.png", r"images\.train\.0\.image: '\.\./img/\*\.png' must be a path below root without"),
        ("mask/{name}", "a/../../{name}", r"images\.train\.0\.mask: .* must be a path below root without '\.\.'"),
        ("[labels]", '[table]\nfiles = ["../a.csv"]\n[labels]', r"table\.files\.0: '\.\./a\.csv' must be a path below"),
        ("[labels]", '[table]\nfiles = ["/a.csv"]\n[labels]', r"table\.files\.0: '/a\.csv' must be a path below root"),
        ("stride = 4", "stride = 9", "labels: stride 9 is larger than side 8"),
        ("minimum = 0.05", "minimum = 1.5", r"labels\.minimum: .* less than 1"),
        ('"mask-crops"', '"masks"', "labels: .*'masks'.*'mask-crops'"),
        ("train =", "all =", r"\[split\] and images\.all belong together"),
        ("[labels]", '[split]\nby = "hash"\n[labels]', r"\[split\] and images\.all belong together"),
        ("[labels]", '[group]\ncolumn = "case"\n[labels]', r"a column needs a table; add \[table\]"),
        ("[labels]", '[group]\npattern = "a"\n[labels]', r"group\.pattern: 'a' has 0 groups; it must have one"),
        ("[labels]", '[group]\npattern = "("\n[labels]', r"group\.pattern: '\(' is not a valid regular expression"),
        ("[labels]", "[group]\n[labels]", "group: set either column or pattern"),
    ],
)
def test_the_error_names_a_wrong_key_and_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in HEAD + CROP_LABELS
    file = put(tmp_path, (HEAD + CROP_LABELS).replace(old, new))

    with pytest.raises(DatasetFileError, match=message) as raised:
        load_dataset(file)
    assert str(raised.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('test = ["testA", "testB"]', 'test = ["train"]', "split: split value train is given twice"),
        ('[group]\ncolumn = "patient"', "", r"this split needs groups; describe in \[group\]"),
        ('source = "csv"', 'source = "csv"\ncolumns = ["red"]', r"labels\.columns has 1 names for 2 classes"),
        (
            'source = "csv"',
            'source = "csv"\ncolumns = ["r", "b"]\nlist_column = "t"',
            "labels: set columns or list_column",
        ),
        (
            'source = "csv"',
            'source = "folders"\nfolders = { a = "green" }',
            r"labels\.folders names green; .* red, blue",
        ),
        ('source = "csv"', 'source = "csv"\nsplits = ["train"]', r"images\.all needs a mask"),
        ('by = "table"', 'by = "hash"', r"unknown key split\.test; unknown key split\.val_groups"),
        ("[images]\nall", "[images]\ntrain = []\nall", "images must name at least one pattern"),
    ],
)
def test_the_error_names_contradicting_sections(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE_LABELS
    toml = HEAD + TABLE_LABELS.replace(old, new)
    if 'by = "hash"' in new:
        toml = toml.replace("val = []\n", "")

    with pytest.raises(DatasetFileError, match=message):
        load_dataset(put(tmp_path, toml))


def test_a_class_may_have_the_name_white_if_no_background_is_predicted(tmp_path: Path) -> None:
    dataset = load_dataset(put(tmp_path, (HEAD + CROP_LABELS).replace('"blue"', '"white"')))
    assert dataset.class_names == ("red", "white")


def documented() -> str:
    return (REPOSITORY / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_documented_examples_are_valid_and_cover_every_label_source() -> None:
    cards = [
        DatasetCard.model_validate(tomllib.loads(block))
        for block in re.findall(r"```toml\n(.*?)```", documented(), re.DOTALL)
    ]

    assert [card.labels.source for card in cards] == ["file-name", "csv", "folders", "mask-crops"]


def test_every_key_is_documented() -> None:
    def sections() -> Iterator[type[BaseModel]]:
        for module in (dataset_card, dataset_sections):
            for thing in vars(module).values():
                if isinstance(thing, type) and issubclass(thing, BaseModel) and thing.__module__ == module.__name__:
                    yield thing

    text = documented()
    keys = {key for section in sections() for key in section.model_fields}
    assert len(keys) > 30
    assert {key for key in keys if f"`{key}`" not in text and f"[{key}]" not in text} == set()
