"""Which split an image falls into: by a hash of its group, or by a column of the data set's table."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import LabelError
from pipeline.training.dataset_card import Group, Split, Table, TableSplit

Row = Mapping[str, str]

_TOO_MANY = "cells beyond the header"


def hash_split(group: str, train: float, val: float) -> Split:
    """Return the split of a group by a hash of its name, so that new groups move no old one."""
    fraction = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if fraction < train else "val" if fraction < train + val else "test"


def table_splits(
    images: Mapping[str, Path], rows: Mapping[str, Row], groups: Mapping[str, str], rule: TableSplit
) -> dict[str, Split]:
    """Return the split of each image, by the image's name, as a column of the table says and `val_groups` changes it.

    Raises LabelError for a value that the rule does not name, or a held-out group without training images.
    """
    values: dict[Split, tuple[str, ...]] = {"train": rule.train, "val": rule.val, "test": rule.test}
    by_value = {value: split for split, own in values.items() for value in own}
    found: dict[str, Split] = {}
    for name, image in images.items():
        value = _value(image, rows[name], rule.column)
        if value not in by_value:
            raise LabelError(
                f"{image}: column {rule.column} says {value}; [split] knows {', '.join(by_value)}: add it there"
            )
        found[name] = by_value[value]
    training_groups = {groups[name] for name, split in found.items() if split == "train"}
    if strange := sorted(set(rule.val_groups) - training_groups):
        raise LabelError(f"[split] val_groups names {', '.join(strange)}, which no training image belongs to")
    held_out = {name for name, split in found.items() if split == "train" and groups[name] in rule.val_groups}
    return found | dict.fromkeys(held_out, "val")


def group_of(image: Path, row: Row, rule: Group) -> str:
    """Return the group that an image belongs to. Raises LabelError where its row or its name does not say."""
    if rule.column is not None:
        return _value(image, row, rule.column)
    assert rule.pattern is not None
    found = re.search(rule.pattern, image.stem)
    if found is None:
        raise LabelError(f"{image}: the group pattern {rule.pattern!r} does not match the file name")
    return str(found[1])


def rows_of(images: Mapping[str, Path], root: Path, table: Table) -> dict[str, Row]:
    """Return the table's row of each image, by the image's name.

    Raises LabelError for a table that cannot be read, an image without a row or a name with two.
    """
    by_name: dict[str, Row] = {}
    for file in table.files:
        for row in _read_table(root / file, table.name_column):
            name = row[table.name_column]
            if name in by_name:
                raise LabelError(f"{root / file}: {name} has two rows; keep one")
            by_name[name] = row
    rows = {}
    for name, image in images.items():
        row = by_name.get(name, by_name.get(image.name, {}))
        if not row:
            raise LabelError(f"{image}: has no row in {', '.join(table.files)} (column {table.name_column})")
        rows[name] = row
    return rows


def _read_table(file: Path, name_column: str) -> list[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey=_TOO_MANY, restval="")
            rows: list[Row] = list(reader)
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{file}: the table cannot be read: {error}") from error
    if name_column not in columns:
        raise LabelError(f"{file}: has no column {name_column}; its columns are {', '.join(columns)}")
    if wide := [row[name_column] for row in rows if _TOO_MANY in row]:
        raise LabelError(f"{file}: the row of {wide[0]} has more cells than the header; quote cells that hold a comma")
    return rows


def _value(image: Path, row: Row, column: str) -> str:
    value = row.get(column)
    if not value:
        raise LabelError(f"{image}: the table has no {column} for it; its columns are {', '.join(row)}")
    return value
