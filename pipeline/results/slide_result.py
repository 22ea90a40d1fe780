"""How a slide ended, for the batch, the summary and the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from pipeline.results.record import PACKAGE, Run

Status = Literal["done", "no tissue", "unrecognized", "skipped", "failed"]

STATUSES: tuple[Status, ...] = get_args(Status)
"""All statuses, in the order in which people read them."""

COLUMNS: dict[str, Callable[[Run], object]] = {
    "tissue_mm2": lambda run: run.tissue_mm2,
    "unfamiliar_share": lambda run: None if run.familiarity is None else round(run.familiarity.unfamiliar_share, 4),
}
"""Columns of `summary.csv` that come from the run record, besides those of the classes' areas. One entry adds one."""

AREA_COLUMN = "area_mm2 "
"""Prefix of the columns with the area of a class."""


@dataclass(frozen=True)
class SlideResult:
    """How one slide ended."""

    slide: str
    """Name of the result: the path of its folder below the output folder, with slashes."""
    status: Status
    seconds: float
    areas_mm2: dict[str, float] = field(default_factory=dict)
    """Area per class."""
    columns: dict[str, object] = field(default_factory=dict)
    """The values of `COLUMNS`."""
    folder: Path | None = None
    """The result's folder; None if the slide failed."""
    resumed_blocks: int = 0
    """Blocks that an earlier, interrupted run had finished."""
    warnings: tuple[str, ...] = ()
    error: str = ""
    failed_before: bool = False
    """Whether an earlier run found this failure and this run did not attempt the slide."""
    refused: bool = False
    """Whether the slide failed because its folder holds the result of another run, which stays."""

    @property
    def tissue_mm2(self) -> float | None:
        """Return the area of the tissue, or None if the slide failed."""
        value = self.columns.get("tissue_mm2")
        return value if isinstance(value, float) else None

    def row(self) -> dict[str, object]:
        """Return the slide's row of `summary.csv`."""
        return {
            "slide": self.slide,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            **{name: self.columns.get(name) for name in COLUMNS},
            **{AREA_COLUMN + name: area for name, area in self.areas_mm2.items()},
            "resumed_blocks": self.resumed_blocks,
            "warnings": "; ".join(self.warnings),
            "error": self.error,
        }


def finished_result(name: str, folder: Path, run: Run, seconds: float) -> SlideResult:
    """Return the result of a slide that this run has just segmented."""
    return SlideResult(
        slide=name,
        status=run.status,
        seconds=seconds,
        areas_mm2=run.class_areas_mm2,
        columns=_columns(run),
        folder=folder,
        resumed_blocks=run.resumed_blocks,
        warnings=run.warnings,
    )


def skipped_result(name: str, folder: Path, run: Run, seconds: float) -> SlideResult:
    """Return the result of a slide that an earlier run has finished. A result of another version gets a warning."""
    made_by, current = run.versions.get(PACKAGE), version(PACKAGE)
    note = f"made by {PACKAGE} {made_by} and kept by {current}; --force computes it again"
    warnings = run.warnings if made_by == current else (*run.warnings, note)
    areas_mm2, columns = run.class_areas_mm2, _columns(run)
    return SlideResult(name, "skipped", seconds, areas_mm2, columns, folder, warnings=warnings)


def _columns(run: Run) -> dict[str, object]:
    return {name: value(run) for name, value in COLUMNS.items()}
