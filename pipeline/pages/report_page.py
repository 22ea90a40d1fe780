"""The report: a page of all slides of a results folder, `index.html` beside `summary.csv`."""

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

from models.tissue_class import TissueClass
from pipeline.errors import OutputError, RunRecordError
from pipeline.files import is_file, only_writer, write_atomically
from pipeline.pages.page import render_page
from pipeline.results.areas import UNKNOWN, ClassArea, class_areas
from pipeline.results.find import result_folders, result_name
from pipeline.results.names import PAGE, PREVIEW, RUN, SUMMARY, THUMBNAIL
from pipeline.results.record import LeftOutArea, Run, read_header, read_run
from pipeline.results.slide_result import AREA_COLUMN, STATUSES
from pipeline.results.summary import read_summary

log = logging.getLogger(__name__)

_FOLDERS = re.compile(
    r"""(?<![\w.])(?:[A-Za-z]:|~|\.\.?)?[\\/](?:(?=((?:(?!\.(?:svs|tiff?|ndpi|mrxs|scn|bif|dcm|czi|csv|json)[\s,(])"""
    r"""(?:\([^\\/()\n]*\)|[^\\/:;)'"\n]|[:;](?!\s)|(?<=\w)'(?=\w)))+))\1(?<!\s)[\\/])+""",
    re.IGNORECASE,
)
"""The folders of a path that begins at a root, a drive, `~`, `.` or `..`.

Names of folders can contain punctuation. Punctuation that ends the path in an English sentence is not part of it: `: `,
`; `, a quotation mark, and a closing parenthesis that was opened before the path. The name of a slide ends it too.

A lookahead and `\\1` match each name as a whole. A possessive quantifier would do the same, but with Python 3.11.2 of
Debian 12, it misses names with punctuation.
"""


@dataclass(frozen=True)
class SlideRow:
    """One slide as the report shows it."""

    name: str
    status: str
    page: str | None
    """Link to the slide's own page; None if there is no such page."""
    thumbnail: str | None
    tissue_mm2: float | None
    areas: Sequence[ClassArea]
    left_out: Sequence[LeftOutArea]
    """Areas beside plain tissue, folds included."""
    seconds: float | None
    resumed_blocks: int
    model: str
    warnings: Sequence[str]
    error: str
    scope: str = ""
    """What the training data of the model show."""
    limits: str = ""
    """Uses that the model is not for."""
    unfamiliar_warning: str = ""
    """The one of the warnings that states that the slide does not look like the training data."""

    def area_mm2(self, name: str) -> float | None:
        """Return the area of a class; None if the slide's model does not have this class."""
        return next((one.area_mm2 for one in self.areas if one.name == name), None)


def write_report(output: Path) -> Path:
    """Write the report from `summary.csv` and the results beside it, and return its path.

    Several runs may write the report of one folder at the same time: the last one includes the slides of all. Raises
    OutputError if `summary.csv` is not a summary or the page cannot be written.
    """
    path = output / PAGE
    try:
        with only_writer(path, output / ".report.lock"):
            write_atomically(path, _render(_rows(output)))
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; the results do not depend on this page"
        ) from error
    return path


def _render(rows: Sequence[SlideRow]) -> str:
    known = list(dict.fromkeys(one.name for row in rows for one in row.areas))
    # A failed slide may have the result of an earlier run, which does not count here.
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
        models=sorted({(row.model, row.scope, row.limits) for row in rows if row.limits}),
    )


def _in_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    names = [*STATUSES, *sorted(counts.keys() - set(STATUSES))]
    return [(name, counts[name]) for name in names if counts.get(name)]


def _total(rows: Iterable[SlideRow]) -> list[ClassArea]:
    """Return the classes of all slides, each in the color of the first slide that knows it."""
    areas: dict[str, float] = {}
    classes: dict[str, TissueClass] = {}
    for row in rows:
        for one in row.areas:
            areas[one.name] = areas.get(one.name, 0.0) + one.area_mm2
            if one.color != UNKNOWN:
                classes.setdefault(one.name, TissueClass(one.name, one.color))
    return class_areas(areas, classes.values())


def _rows(output: Path) -> list[SlideRow]:
    """Return a row for each slide of the summary, and for each result that the summary lacks."""
    summary = read_summary(output / SUMMARY)
    folders = {result_name(output, path): path for path in result_folders(output)}
    results = {name for name, path in folders.items() if read_header(path)}
    for name in sorted(folders.keys() - results - summary.keys()):
        log.warning(
            "%s: left out of the report: its %s is damaged or was written by another program, and %s does not list it",
            folders[name],
            RUN,
            SUMMARY,
        )
    return [
        _row(name, summary.get(name, {}), output, folder, _readable_run(folder))
        for name in sorted({*summary, *results}, key=_natural)
        for folder in (folders.get(name, output / name),)
    ]


def _readable_run(folder: Path) -> Run | None:
    try:
        return read_run(folder)
    except RunRecordError as error:
        # One damaged file must not take the report from all other slides.
        log.warning("%s", error)
        return None


def _natural(name: str) -> list[tuple[float, str]]:
    """Return a sort key that puts "slide 9" before "slide 10"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _row(name: str, summary: Mapping[str, Any], output: Path, folder: Path, run: Run | None) -> SlideRow:
    """Return a slide's row from its record or, if the record is lost, from its row in the summary."""
    status = str(summary.get("status") or (run.status if run else "done"))
    failed = status == "failed"
    areas, tissue_mm2 = (run.class_areas_mm2, run.tissue_mm2) if run else _areas_of_summary(summary)
    return SlideRow(
        name=name,
        status=status,
        page=_link(output, folder, PAGE) or (_link(output, folder, PREVIEW) if run else None),
        thumbnail=_link(output, folder, THUMBNAIL),
        tissue_mm2=None if failed else tissue_mm2,
        areas=[] if failed else class_areas(areas, run.classes if run else ()),
        left_out=[one for one in run.left_out if one.pieces] if run and not failed else [],
        seconds=_number(summary.get("seconds")),
        resumed_blocks=int(_number(summary.get("resumed_blocks")) or 0),
        model=run.model if run else "",
        warnings=_warnings(name, summary, run, failed=failed),
        # The page is passed on: `summary.csv` has the whole text, with the folders of this machine.
        error=_FOLDERS.sub("", str(summary.get("error", ""))),
        scope=run.scope if run else "",
        limits=run.limits if run else "",
        unfamiliar_warning=run.unfamiliar_warning if run and not failed else "",
    )


def _warnings(name: str, summary: Mapping[str, Any], run: Run | None, *, failed: bool) -> list[str]:
    if failed:
        return ["the result of an earlier run is still there"] if run else []
    if run:
        return list(run.warnings)
    # Not split: a warning can contain "; ".
    warnings = str(summary.get("warnings", ""))
    lost = f"{name}/{RUN} is missing or cannot be read; the numbers are those of {SUMMARY}"
    return [warnings, lost] if warnings else [lost]


def _areas_of_summary(summary: Mapping[str, Any]) -> tuple[dict[str, float], float | None]:
    numbers = {key: value for key in summary if (value := _number(summary[key])) is not None}
    areas = {key.removeprefix(AREA_COLUMN): value for key, value in numbers.items() if key.startswith(AREA_COLUMN)}
    return areas, numbers.get("tissue_mm2")


def _link(output: Path, folder: Path, name: str) -> str | None:
    # The name of a failed slide can be too long for a folder, and a name in an edited summary can be an absolute path.
    if not folder.is_relative_to(output) or not is_file(folder / name):
        return None
    # A colon, too, is quoted: a browser would read what stands before it as a scheme.
    place = quote(folder.relative_to(output).as_posix(), safe="/", errors="surrogateescape")
    return f"{place}/{name}"


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
