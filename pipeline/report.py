"""What is said of a run: `run.json` for each slide, `summary.csv` for all."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from filelock import FileLock

from pipeline.errors import OutputError
from pipeline.journal import sync

Status = Literal["done", "no tissue", "skipped", "failed"]

RUN_FORMAT = 1
"""Raised when results of older versions can no longer stand for a run of this one."""

_VERSIONS = ("wsi-segment", "torch", "openslide-python", "tiffslide", "zarr", "shapely", "segmentation-models-pytorch")


@dataclass(frozen=True)
class SlideResult:
    """How one slide ended."""

    slide: str
    status: Status
    seconds: float
    areas_mm2: dict[str, float] = field(default_factory=dict)
    """Area per class."""
    tissue_mm2: float | None = None
    folder: Path | None = None
    """Where the results are."""
    resumed_blocks: int = 0
    """Blocks that an earlier, interrupted run had finished."""
    warnings: tuple[str, ...] = ()
    error: str = ""

    def row(self) -> dict[str, object]:
        """The result in plain values."""
        return {
            "slide": self.slide,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "tissue_mm2": self.tissue_mm2,
            **{f"area_mm2 {name}": area for name, area in self.areas_mm2.items()},
            "resumed_blocks": self.resumed_blocks,
            "warnings": "; ".join(self.warnings),
            "error": self.error,
        }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS}


def read_run(folder: Path) -> dict[str, object] | None:
    """A finished result's `run.json`; None where there is none that can be read."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Another program's run.json is no sign that a run of ours wrote the folder.
    ours = isinstance(run, dict) and isinstance(run.get("identity"), dict) and isinstance(run.get("outputs"), list)
    return run if ours else None


def write_run(folder: Path, run: Mapping[str, object]) -> None:
    """Write `run.json` into a result's folder."""
    (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_summary(output: Path, results: Iterable[SlideResult]) -> Path:
    """Bring `summary.csv` up to date: a row for each slide, those of earlier runs into the same folder kept.

    Raises OutputError where the file that is there is no such table; it is left as it is.
    """
    path = output / "summary.csv"
    lock_path = output / ".summary.lock"
    with FileLock(lock_path):
        rows: dict[str, dict[str, object]] = {}
        if path.exists():
            rows = _read_summary(path)
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
        lock_path.unlink(missing_ok=True)
    return path


def _read_summary(path: Path) -> dict[str, dict[str, object]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    # None: a row longer than the header.
    if any("slide" not in row or None in row for row in rows):
        raise OutputError(f"{path}: is no summary that a run has written; move it away, the next run makes a new one")
    return {row["slide"]: {**row} for row in rows}


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    sync(partial)
    partial.replace(path)
