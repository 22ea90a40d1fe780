"""The split of an image: by a hash of its group, or by a column of the data set's table."""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import LabelError
from pipeline.files import is_file, nfc_name
from pipeline.training.dataset_sections import SPLITS, Group, Split, Table, TableSplit

logger = logging.getLogger(__name__)

Row = Mapping[str, str]

_TOO_MANY = "cells beyond the header"

MOST_TABLE_BYTES = 1 << 28
"""Largest size of a table, which is read into memory: 256 MiB, millions of rows."""

_SHOWN_CHARACTERS = 200
"""Characters of the names of columns that an error shows."""


def hash_split(group: str, train: float, val: float) -> Split:
    """Return the split of a group by a hash of its name, so that new groups do not move old ones."""
    fraction = hash_fraction(group)
    return "train" if fraction < train else "val" if fraction < train + val else "test"


def hash_fraction(group: str) -> float:
    """Return a number from 0 to 1 (exclusive) that depends only on the name of a group."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32


def table_splits(
    images: Mapping[str, Path], rows: Mapping[str, Row], groups: Mapping[str, str], rule: TableSplit
) -> dict[str, Split]:
    """Return the split of each image by image name, from a column of the table and `val_groups`.

    Raises LabelError for a value that the rule does not list, or a held-out group without training images.
    """
    values: dict[Split, tuple[str, ...]] = {"train": rule.train, "val": rule.val, "test": rule.test}
    by_value = {value: split for split, own in values.items() for value in own}
    found: dict[str, Split] = {}
    for name, image in images.items():
        value = _value(image, rows[name], rule.column)
        if value not in by_value:
            raise LabelError(
                f"{image}: column {rule.column} contains {value}, but [split] lists only "
                f"{', '.join(by_value)}; add the value to [split]"
            )
        found[name] = by_value[value]
    training_groups = {groups[name] for name, split in found.items() if split == "train"}
    if strange := sorted(set(rule.val_groups) - training_groups):
        raise LabelError(f"[split] val_groups lists {', '.join(strange)}, but no training image belongs to it")
    held_out = {name for name, split in found.items() if split == "train" and groups[name] in rule.val_groups}
    return found | dict.fromkeys(held_out, "val")


def shared_groups(split_of: Mapping[str, Split], groups: Mapping[str, str], split: Split) -> list[str]:
    """Return the groups, sorted, with images in this split and in one before it in the order train, val, test.

    The keys of `split_of` and `groups` are the names of the images.
    """
    before = SPLITS[: SPLITS.index(split)]
    known = {groups[name] for name, own in split_of.items() if own in before}
    return sorted({groups[name] for name, own in split_of.items() if own == split and groups[name] in known} - {""})


def group_of(image: Path, row: Row, rule: Group) -> str:
    """Return the group of an image. Raises LabelError if its row or its name does not contain the group."""
    if rule.column is not None:
        return _value(image, row, rule.column)
    assert rule.pattern is not None
    found = re.search(rule.pattern, image.stem)
    if found is None:
        raise LabelError(f"{image}: the group pattern {rule.pattern!r} does not match the file name")
    return str(found[1])


def rows_of(images: Mapping[str, Path], root: Path, table: Table, *, all_images: bool = False) -> dict[str, Row]:
    """Return the table row of each image by image name.

    Names are compared after Unicode normalization (NFC), because a Mac decomposes the umlauts of file names. If these
    are all images of the data set, a warning counts the rows without an image, and a message those whose image exists
    but matches no pattern. A process logs them once.

    Raises LabelError for an unreadable table, a column name that occurs twice, or an image with no row or two rows.
    """
    by_name: dict[str, Row] = {}
    for file in table.files:
        for row in _read_table(root / file, table.name_column):
            name = nfc_name(row[table.name_column])
            if name in by_name:
                raise LabelError(f"{root / file}: {name} has two rows; delete one")
            by_name[name] = row
    rows, used = {}, set()
    for name, image in images.items():
        below_root = nfc_name(image.relative_to(root).as_posix()) if image.is_relative_to(root) else ""
        file_name = nfc_name(image.name)
        found = [key for key in dict.fromkeys((nfc_name(name), file_name, below_root)) if key in by_name]
        if "/" in below_root and below_root in found and image.name != name:
            # The bare name can be that of an image in another folder.
            found = [key for key in found if key != file_name]
        if not found:
            raise LabelError(f"{image}: has no row in {', '.join(table.files)} (column {table.name_column}); add one")
        if len(found) > 1:
            raise LabelError(
                f"{image}: has several rows in {', '.join(table.files)}, {' and '.join(found)} (column "
                f"{table.name_column}); keep one"
            )
        rows[name] = by_name[found[0]]
        used.add(found[0])
    if all_images:
        files = ", ".join(str(root / file) for file in table.files)
        unused = [name for name in by_name if name and name not in used]
        lost = [name for name in unused if not is_file(root / name)]
        if lost:
            log_once(
                logging.WARNING,
                f"{len(lost)} of {len(by_name)} rows of {files} have no image (such as {lost[0]}); if they should have "
                "one, check the patterns in [images]",
            )
        if others := sorted(set(unused) - set(lost)):
            log_once(
                logging.INFO,
                f"{len(others)} of {len(by_name)} rows of {files} belong to images that the patterns in [images] leave "
                f"out (such as {others[0]})",
            )
    return rows


@functools.cache
def log_once(level: int, message: str) -> None:
    """Log a message, unless this process has logged it before. Each split of a data set reads the table."""
    logger.log(level, message)


def _read_table(file: Path, name_column: str) -> list[Row]:
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_TABLE_BYTES:
            raise LabelError(f"{file}: is not a file of at most {MOST_TABLE_BYTES >> 20} MiB; use a CSV file")
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey=_TOO_MANY, restval="")
            # Spreadsheets write rows of empty cells below the table.
            rows: list[Row] = [row for row in reader if any("".join(cells).strip() for cells in row.values())]
            columns = reader.fieldnames or ()
    except UnicodeDecodeError as error:
        raise LabelError(f"{file}: the table is not UTF-8; in the spreadsheet, save it as CSV UTF-8") from error
    except (OSError, csv.Error) as error:
        raise LabelError(f"{file}: the table cannot be read: {error}") from error
    if name_column not in columns:
        names = ", ".join(columns)
        shown = names if len(names) <= _SHOWN_CHARACTERS else f"{names[:_SHOWN_CHARACTERS]}…"
        hint = "; separate the columns with commas" if len(columns) == 1 and re.search("[;\t]", names) else ""
        raise LabelError(f"{file}: has no column {name_column}; the columns are {shown}{hint}")
    # Spreadsheets write several columns without a name, which nothing reads.
    if twice := [column for column, count in Counter(columns).items() if column and count > 1]:
        raise LabelError(f"{file}: has several columns {', '.join(twice)}; rename or delete all but one of each")
    if wide := [row[name_column] for row in rows if _TOO_MANY in row]:
        raise LabelError(
            f"{file}: the row of {wide[0]} has more cells than the header; quote cells that contain a comma"
        )
    return rows


def _value(image: Path, row: Row, column: str) -> str:
    value = (row.get(column) or "").strip()  # a stray space would make two groups of one patient
    if not value:
        raise LabelError(f"{image}: the table has no {column} for this image; the columns are {', '.join(row)}")
    return value
