"""The page of all slides of a results folder: `index.html`, beside `summary.csv`."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import OutputError
from pipeline.files import only_writer, write_atomically
from pipeline.pages.page import css_colour, render_page
from pipeline.pages.slide_page import PAGE, THUMBNAIL, ClassArea, class_areas
from pipeline.results.record import read_run
from pipeline.results.summary import read_summary

log = logging.getLogger(__name__)

STATUSES = ("done", "no tissue", "skipped", "failed")
"""In the order in which they are counted up."""

_FOLDERS = re.compile(r"""(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\\/:;,()'"\n]*[^\\/:;,()'"\s][\\/])+""")
"""The folders of an absolute path."""

AREA_COLUMN = "area_mm2 "
"""What the columns of `summary.csv` begin with that hold a class's area."""


@dataclass(frozen=True)
class SlideRow:
    """What the page says of one slide."""

    name: str
    status: str
    page: str | None
    """Link to the slide's own page; None where there is none."""
    thumbnail: str | None
    tissue_mm2: float | None
    areas: Sequence[ClassArea]
    seconds: float | None
    resumed_blocks: int
    model: str
    warnings: Sequence[str]
    error: str

    def area_mm2(self, name: str) -> float | None:
        """The area of a class; None where the slide's model does not know it."""
        return next((one.area_mm2 for one in self.areas if one.name == name), None)


def write_report(output: Path) -> Path:
    """Write `index.html` anew from `summary.csv` and the results beside it; returns its path.

    Runs into the same folder may do so at the same time: the last one sees the slides of all. Raises OutputError where
    `summary.csv` is no summary or the page cannot be written.
    """
    path = output / PAGE
    try:
        with only_writer(path, output / ".report.lock"):
            write_atomically(path, _render(_rows(output)))
    except OSError as error:
        raise OutputError(
            f"{path}: the report cannot be written: {error.strerror or error}; the results themselves are complete"
        ) from error
    return path


def _render(rows: Sequence[SlideRow]) -> str:
    known = list(dict.fromkeys(one.name for row in rows for one in row.areas))
    # A failed slide may have a former result beside it, which is no part of these.
    counted = [row for row in rows if row.status != "failed"]
    return render_page(
        "report.html",
        rows=rows,
        classes=known,
        total=_total(counted),
        tissue_mm2=sum(row.tissue_mm2 or 0.0 for row in counted),
        seconds=sum(row.seconds or 0.0 for row in rows),
        counts=_in_order(Counter(row.status for row in rows)),
        noted=sum(bool(row.warnings or row.error) for row in rows),
    )


def _in_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    names = [*STATUSES, *sorted(counts.keys() - set(STATUSES))]
    return [(name, counts[name]) for name in names if counts.get(name)]


def _total(rows: Iterable[SlideRow]) -> list[ClassArea]:
    """The classes of all slides, each in the colour that the first slide has it in."""
    areas: dict[str, float] = {}
    colours: dict[str, Sequence[int]] = {}
    for row in rows:
        for one in row.areas:
            areas[one.name] = areas.get(one.name, 0.0) + one.area_mm2
            colours.setdefault(one.name, one.colour)
    return class_areas(areas, [{"name": name, "color": colour} for name, colour in colours.items()])


def _rows(output: Path) -> list[SlideRow]:
    """A row for each slide of the summary, and for each result that it has lost."""
    summary = read_summary(output / "summary.csv")
    folders = {_text(path.name): path for path in sorted(output.iterdir()) if (path / "run.json").is_file()}
    names = sorted({*summary, *(name for name, path in folders.items() if read_run(path))}, key=_natural)
    return [_row(name, summary.get(name, {}), folders.get(name, output / name)) for name in names]


def _row(name: str, told: Mapping[str, Any], folder: Path) -> SlideRow:
    try:
        return _row_of(name, told, folder, read_run(folder) or {})
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        # Somebody has changed the run.json by hand: one slide's facts must not take the page from all the others.
        log.warning("%s: run.json is not as a run writes it", folder)
        return _row_of(name, told, folder, {})


def _natural(name: str) -> list[tuple[float, str]]:
    """Sorts as people do: "slide 9" before "slide 10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _text(name: str) -> str:
    """A file's name as `summary.csv` has it: bytes that are no text written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _row_of(name: str, told: Mapping[str, Any], folder: Path, run: Mapping[str, Any]) -> SlideRow:
    """What `run.json` says of a slide, and where that is missing, what its row in the summary told."""
    status = str(told.get("status") or run.get("status", "done"))
    warnings = list(run.get("warnings", [])) or [w for w in str(told.get("warnings", "")).split("; ") if w]
    if status == "failed":
        warnings = ["the result of an earlier run is still there"] if run else []
    elif not run:
        warnings.append(f"{name}/run.json is missing or cannot be read; the numbers are those of summary.csv")
    areas = run.get("class_areas_mm2") or {
        key.removeprefix(AREA_COLUMN): float(value)
        for key, value in told.items()
        if key.startswith(AREA_COLUMN) and _number(value) is not None
    }
    tissue_mm2 = _number(run.get("tissue_mm2", told.get("tissue_mm2")))
    failed = status == "failed"
    classes = class_areas({name: _finite(area) for name, area in areas.items()}, run.get("classes", []))
    for one in classes:
        css_colour(one.colour)
    return SlideRow(
        name=name,
        status=status,
        page=_link(folder, PAGE) or (_link(folder, "preview.png") if run else None),
        thumbnail=_link(folder, THUMBNAIL),
        tissue_mm2=None if failed else tissue_mm2,
        areas=[] if failed else classes,
        seconds=_number(told.get("seconds")),
        resumed_blocks=int(_number(told.get("resumed_blocks")) or 0),
        model=str(run.get("model", "")),
        warnings=warnings,
        # The page is passed on: `summary.csv` has the whole text, with the folders of this machine.
        error=_FOLDERS.sub("", str(told.get("error", ""))),
    )


def _link(folder: Path, name: str) -> str | None:
    # A colon, too, is quoted: what stands before it would be taken for a scheme.
    return f"{quote(folder.name, safe='', errors='surrogateescape')}/{name}" if (folder / name).is_file() else None


def _number(text: object) -> float | None:
    try:
        return _finite(text)
    except ValueError:
        return None


def _finite(text: object) -> float:
    value = float(str(text))
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of anything")
    return value
