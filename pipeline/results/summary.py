"""The table of all slides of an output folder: `summary.csv`, one row per slide."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import OutputError
from pipeline.files import only_writer, write_atomically
from pipeline.results.slide_result import SlideResult


def write_summary(output: Path, results: Iterable[SlideResult]) -> Path:
    """Bring `summary.csv` up to date: a row for each slide, those of earlier runs into the same folder kept.

    Raises OutputError where the file that is there is no such table; it is left as it is.
    """
    path = output / "summary.csv"
    with only_writer(path, output / ".summary.lock"):
        rows = read_summary(path)
        for result in results:
            # A skipped slide's row still tells what the run that made its result found, unless one failed in between.
            if result.status != "skipped" or rows.get(result.slide, {}).get("status", "failed") == "failed":
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
    return path


def read_summary(path: Path) -> dict[str, dict[str, object]]:
    """The rows of a `summary.csv` by their slides, none where there is no such file; all values are text.

    Raises OutputError where the file is no summary.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    # None: a row longer than the header.
    if any("slide" not in row or None in row for row in rows):
        raise OutputError(f"{path}: is no summary that a run has written; move it away, the next run makes a new one")
    return {row["slide"]: {**row} for row in rows}
