"""`summary.csv`: the table of all slides of an output folder, one row per slide."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from models.tissue_class import ClassName
from pipeline.errors import OutputError
from pipeline.files import WRITER_S, name_key, only_writer, printable_name, same_file, write_atomically
from pipeline.results.names import SUMMARY
from pipeline.results.slide_result import AREA_COLUMN, COLUMNS, SlideResult

# An error message may be longer than the 131,072 characters that csv reads by default.
csv.field_size_limit(2**31 - 1)

TEXT_COLUMNS = ("slide", "warnings", "error")
"""Columns whose texts come from file names. See `_quoted`."""

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""The beginning of a cell that spreadsheets compute, after quotes of ours."""

_CLASS_NAME: TypeAdapter[str] = TypeAdapter(ClassName)


def write_summary(output: Path, results: Iterable[SlideResult], wait_s: float = WRITER_S) -> None:
    """Write the rows of these slides into `summary.csv` and keep the rows of all other slides.

    On a file system that ignores case, a row with another spelling of a result's folder is replaced too.

    Rows of folders that could not be searched are not kept: only the run that writes them knows.

    Raises OutputError if the existing file is not a summary, or if another process writes it for more than `wait_s`
    seconds; the file is not changed.
    """
    path = output / SUMMARY
    with only_writer(path, output / ".summary.lock", wait_s):
        rows = {name: row for name, row in read_summary(path).items() if not is_folder(name)}
        spellings: dict[str, list[str]] = defaultdict(list)
        for name in rows:
            spellings[name_key(name)].append(name)
        for result in results:
            name = printable_name(result.slide)
            others = [other for other in spellings[name_key(name)] if other != name]
            for other in others:
                if other in rows and _is_folder_of(output / other, result):
                    rows.setdefault(name, rows.pop(other))
            row = _kept_row(rows.get(name, {}), result)
            rows[name] = (result.row() if row is None else row) | {"slide": name}
        text = io.StringIO()
        writer = csv.DictWriter(text, _columns(rows.values()), restval="")
        writer.writeheader()
        for slide in sorted(rows):
            row = rows[slide]
            writer.writerow(row | {name: _quoted(str(row[name])) for name in TEXT_COLUMNS if row.get(name)})
        write_atomically(path, text.getvalue())


def is_folder(name: str) -> bool:
    """Return whether this is the name of a row for a folder that could not be searched."""
    return name.endswith("/")


def _is_folder_of(folder: Path, result: SlideResult) -> bool:
    """Return whether this is the result's folder in another spelling, on a file system that ignores case."""
    return result.folder is not None and same_file(folder, result.folder)


def _kept_row(row: Mapping[str, object], result: SlideResult) -> dict[str, object] | None:
    """Return the row of an earlier run if it contains more than this result, or None if the result replaces it."""
    has_result = row.get("status") not in (None, "failed")
    if result.failed_before:
        return {**row} if row.get("status") == "failed" else None
    if result.refused and has_result:
        return {**row, "error": result.error}
    # A run that ended between publishing its result and writing this table leaves the row of the result before.
    if result.status == "skipped" and has_result and _facts(row) == _facts(result.row()):
        return {**row, "error": ""}
    return None


def _facts(row: Mapping[str, object]) -> dict[str, str]:
    """Return the cells that state what is in a result, as text and without empty ones."""
    names = [name for name in row if name in COLUMNS or name.startswith(AREA_COLUMN)]
    return {name: str(row[name]) for name in names if row[name] not in (None, "")}


def read_summary(path: Path) -> dict[str, dict[str, object]]:
    """Return the rows of a `summary.csv` by slide, all values as text. Return no rows if the file does not exist.

    Rows without the name of a slide, which spreadsheets leave behind, are left out.

    Raises OutputError if the file is not a summary; an empty file is one.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error):
        rows, columns = [], ("",)
    # An empty file has no columns. The key None holds the values of a row that is longer than the header.
    if (columns and ("slide" not in columns or not _has_valid_classes(columns))) or any(None in row for row in rows):
        raise OutputError(f"{path}: was not written by wsi-segment; move it away, and the next run writes a new one")
    texts = [row | {name: _unquoted(row[name]) for name in TEXT_COLUMNS if row.get(name)} for row in rows]
    return {str(row["slide"]): {**row} for row in texts if row["slide"]}


def _columns(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the columns of a table in their fixed order, with those of newer versions before the texts."""
    found = dict.fromkeys(name for row in rows for name in row)
    areas = sorted(name for name in found if name.startswith(AREA_COLUMN))
    first = ["slide", "status", "seconds", *COLUMNS, *areas, "resumed_blocks"]
    last = ["warnings", "error"]
    return [*first, *sorted(found.keys() - {*first, *last}), *last]


def _quoted(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula. `_unquoted` returns the text itself."""
    return f"'{text}" if _FORMULA.match(text) else text


def _unquoted(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _has_valid_classes(columns: Iterable[str]) -> bool:
    try:
        for column in columns:
            if column.startswith(AREA_COLUMN):
                _CLASS_NAME.validate_python(column.removeprefix(AREA_COLUMN))
    except ValidationError:
        return False
    return True
