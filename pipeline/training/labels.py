"""Presence labels from a file name, a table row, a folder or crops of a mask.

Shape suffixes: K classes, B boxes (x, y, width, height in pixels of the image), H and W the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelError
from pipeline.files import nfc_name
from pipeline.training.dataset_sections import CsvLabels, FileNameLabels, FolderLabels
from wsi.windows import window_starts


def labels_of_name(image: Path, rule: FileNameLabels, classes: int) -> tuple[bool, ...]:
    """Return which classes are present by an image's file name, (K,).

    Raises LabelError if the name has no label, or a label with another number of classes.
    """
    found = re.findall(rule.pattern, image.stem)
    if not found:
        raise LabelError(
            f"{image}: the file name has no label; it must contain one digit 0 or 1 per class, as in [{'0' * classes}]"
        )
    digits = re.findall(r"\S", found[-1].replace(",", ""))
    if len(digits) != classes or not set(digits) <= {"0", "1"}:
        raise LabelError(
            f"{image}: the label [{found[-1]}] in the file name must be {classes} digits 0 or 1, one per class"
        )
    return tuple(digit == "1" for digit in digits)


def labels_of_row(
    image: Path, row: Mapping[str, str], rule: CsvLabels, class_names: tuple[str, ...]
) -> tuple[bool, ...]:
    """Return which classes are present by an image's table row, (K,).

    Raises LabelError if a column is missing, a value is neither 0 nor 1, or a listed name is not a class.
    """
    if rule.list_column is not None:
        listed = {part.strip() for part in _cell(image, row, rule.list_column).split(rule.separator)} - {""}
        if strange := sorted(listed - set(class_names)):
            raise LabelError(
                f"{image}: column {rule.list_column} of the table lists {', '.join(strange)}; "
                f"the classes are {', '.join(class_names)}, separated by {rule.separator!r}"
            )
        return tuple(name in listed for name in class_names)
    present = []
    for column in rule.columns or class_names:
        value = _cell(image, row, column)
        if value not in {"0", "1"}:
            raise LabelError(f"{image}: column {column} of the table contains {value!r}; it must be 0 or 1")
        present.append(value == "1")
    return tuple(present)


def labels_of_folder(image: Path, rule: FolderLabels, class_names: tuple[str, ...]) -> tuple[bool, ...]:
    """Return the classes of an image's folder, (K,). Raises LabelError if the folder has no class.

    Names of folders are compared after Unicode normalization (NFC), because a Mac decomposes their umlauts.
    """
    names = {nfc_name(name): name for name in rule.folders or class_names}
    folder = nfc_name(image.parent.name)
    own = set(rule.classes_of(names.get(folder, folder)))
    if not own or not own <= set(class_names):
        known = ", ".join(rule.folders or class_names)
        raise LabelError(f"{image}: folder {folder} has no class; the class folders are {known}")
    return tuple(name in own for name in class_names)


def crop_boxes(width: int, height: int, side: int, stride: int) -> NDArray[np.int64]:
    """Return the crops of an image row by row, (B, 4) of x, y, width and height.

    Crops start every `stride` pixels, and the last row and column end at the image edge (OEEM, MICCAI 2022). If the
    image is smaller than `side`, the crop ends with the image.
    """
    columns, rows = window_starts(width, side, stride), window_starts(height, side, stride)
    return np.array([(x, y, min(side, width), min(side, height)) for y in rows for x in columns], dtype=np.int64)


def presence(
    labels_HW: NDArray[np.uint8], boxes_B4: NDArray[np.int64], classes: int, minimum: float
) -> NDArray[np.bool_]:
    """Return which classes cover more than the share `minimum` of each box, (B, K).

    Ignored pixels count toward the area of the box but toward no class.
    """
    x, y, width, height = boxes_B4.T
    present_BK = np.empty((len(boxes_B4), classes), dtype=bool)
    for k in range(classes):
        # Summed area table, with a row and column of zeros in front.
        area = np.pad((labels_HW == k).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        covered_B = area[y + height, x + width] - area[y, x + width] - area[y + height, x] + area[y, x]
        # Divide instead of multiplying: 1/20 rounds to the same number as the literal 0.05, so equal is not more.
        present_BK[:, k] = covered_B / (width * height) > minimum
    return present_BK


def _cell(image: Path, row: Mapping[str, str], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise LabelError(f"{image}: the table has no column {column}; the columns are {', '.join(row)}")
    return value.strip()
