"""`summary.csv`: the table of all slides of an output folder, one row per slide."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from models.tissue_class import ClassName
from pipeline.errors import OutputError
from pipeline.files import only_writer, write_atomically
from pipeline.results.names import SUMMARY
from pipeline.results.slide_result import AREA_COLUMN, SlideResult

# An error message may be longer than the 131,072 characters that csv reads by default.
csv.field_size_limit(2**31 - 1)

_CLASS_NAME: TypeAdapter[str] = TypeAdapter(ClassName)


def write_summary(output: Path, results: Iterable[SlideResult]) -> None:
    """Write the rows of these slides into `summary.csv` and keep the rows of all other slides.

    Raises OutputError if the existing file is not a summary; the file is not changed.
    """
    path = output / SUMMARY
    with only_writer(path, output / ".summary.lock"):
        rows = read_summary(path)
        for result in results:
            if not _is_row_kept(rows.get(result.slide, {}).get("status"), result):
                rows[result.slide] = result.row()
        names: dict[str, None] = {}
        for row in rows.values():
            names |= dict.fromkeys(row)
        names = {n: None for n in names if n not in ("warnings", "error")} | {"warnings": None, "error": None}
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows[slide] for slide in sorted(rows))
        write_atomically(path, text.getvalue())


def _is_row_kept(status: object, result: SlideResult) -> bool:
    """Return whether the row of an earlier run contains more than the result of a slide that was not attempted."""
    if result.failed_before:
        return status == "failed"
    return result.status == "skipped" and status not in (None, "failed")


def read_summary(path: Path) -> dict[str, dict[str, object]]:
    """Return the rows of a `summary.csv` by slide, all values as text. Return no rows if the file does not exist.

    Raises OutputError if the file is not a summary.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    # The key None holds the values of a row that is longer than the header.
    if any("slide" not in row or None in row or not _has_valid_classes(row) for row in rows):
        raise OutputError(f"{path}: was not written by wsi-segment; move it away, and the next run writes a new one")
    return {row["slide"]: {**row} for row in rows}


def _has_valid_classes(columns: Iterable[str]) -> bool:
    try:
        for column in columns:
            if column.startswith(AREA_COLUMN):
                _CLASS_NAME.validate_python(column.removeprefix(AREA_COLUMN))
    except ValidationError:
        return False
    return True
