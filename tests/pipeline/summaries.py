"""Read `summary.csv`, by the standard library alone."""

from __future__ import annotations

import csv
from pathlib import Path


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "summary.csv").open(newline="", encoding="utf-8") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}
