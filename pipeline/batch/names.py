"""The names of results: short if possible, and with the slides' folders if two slides have the same file name.

results/b               case1/b.svs: no other slide has this name
results/case1/a         case1/a.svs
results/case2/a         case2/a.svs
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from pipeline.errors import RunRecordError
from pipeline.files import is_file, name_key, same_file
from pipeline.results.names import GEOJSON_END, LEFT_OUT, RUN
from pipeline.results.record import read_run
from pipeline.workers.base import SlideJob

OWN_NAMES = frozenset({"index.html", "qupath", "summary.csv"})
"""Names that runs write beside the slides' folders."""

UNUSABLE = f"{', '.join(sorted(OWN_NAMES))}, left-out, and names that start with a dot or contain a backslash"
"""What `reserved_part` refuses, for messages."""


def named_jobs(jobs: Sequence[SlideJob], output: Path) -> list[SlideJob]:
    """Return the jobs with the names of their results below `output`.

    Slides with the same short name are named by their places. A slide that has a result keeps the name of that result,
    so that a new slide does not move the results of others. Names count as equal if their `name_key` is equal.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        groups[name_key(job.result_name)].append(number)
    named = list(jobs)
    for numbers in groups.values():
        group = [jobs[number] for number in numbers]
        places = _places(group)
        for number, job, place in zip(numbers, group, places, strict=True):
            if place is not None and _takes_its_place(job, place, output, alone=len(group) == 1):
                named[number] = replace(job, name=place)
    return _with_stored_names(named, output)


def _with_stored_names(jobs: Sequence[SlideJob], output: Path) -> list[SlideJob]:
    """Return the jobs with the names of their results as the file system lists the existing folders.

    A file system that ignores case finds the folder `a` as `A` too, but the report has a row for each name.
    """

    @cache
    def listed(folder: Path) -> Mapping[str, Sequence[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        with suppress(OSError):  # the folder does not exist yet, or the attempt reports why it cannot be read
            for path in folder.iterdir():
                names[name_key(path.name)].append(path.name)
        return names

    def stored(name: str) -> str:
        folder, parts = output, name.split("/")
        for number, part in enumerate(parts):
            alike = listed(folder).get(name_key(part), ())
            if not alike:
                break  # nothing lies below a folder that does not exist, and to list it takes time on a network share
            same = [one for one in alike if part not in alike and same_file(folder / one, folder / part)]
            parts[number] = same[0] if same else part
            folder /= parts[number]
        return "/".join(parts)

    names = [stored(job.result_name) for job in jobs]
    return [job if name == job.result_name else replace(job, name=name) for job, name in zip(jobs, names, strict=True)]


def _takes_its_place(job: SlideJob, place: str, output: Path, *, alone: bool) -> bool:
    if place == job.result_name:
        return False
    if alone:
        return _is_result_of(output / place, job)
    return not _is_result_of(output / job.result_name, job)


def _is_result_of(folder: Path, job: SlideJob) -> bool:
    if not is_file(folder / RUN):
        return False
    try:
        run = read_run(folder)
    except RunRecordError:
        return False
    path = None if run is None else run.slide.path
    return path is not None and same_file(path, job.path)


def _places(jobs: Sequence[SlideJob]) -> list[str | None]:
    """Return the place of each job; None if its name cannot change.

    Places below different folders can be equal, and slides that were named by themselves have no folder to start from:
    their places begin below the folder that all of them share.
    """
    movable = [job for job in jobs if job.place is not None or job.name is None]
    given = {name_key(job.place) for job in movable if job.place is not None}
    if len(jobs) == 1 or len(given) == len(movable):
        return [job.place for job in jobs]
    paths = [Path(os.path.abspath(job.path)) for job in jobs]  # noqa: PTH100 - Path.absolute keeps ".."
    common = os.path.commonpath([path.parent for job, path in zip(jobs, paths, strict=True) if job in movable])
    return [
        path.relative_to(common).with_name(job.result_name).as_posix() if job in movable else None
        for job, path in zip(jobs, paths, strict=True)
    ]


def name_clashes(jobs: Iterable[SlideJob]) -> dict[Path, str]:
    """Return an error text for each slide whose result would replace another result or a file of the batch, by path."""
    jobs = list(jobs)
    groups: dict[str, list[Path]] = defaultdict(list)
    for job in jobs:
        groups[name_key(job.result_name)].append(job.path)
    errors: dict[Path, str] = {}
    for job in jobs:
        name = job.result_name
        above = [str(parent) for parent in PurePosixPath(name_key(name)).parents][:-1]  # the last one is "."
        inside = next((parent for parent in above if parent in groups), None)
        same = groups[name_key(name)]
        if reserved_part(name) is not None:
            errors[job.path] = (
                f"{job.path}: results are named after slides, and '{name}' cannot be the name of a result "
                f"({UNUSABLE} are reserved); rename the slide, or name its result in the column 'id' of a manifest"
            )
        elif len(same) > 1:
            errors[job.path] = (
                f"{job.path}: its result would have the same name as that of {_others(job.path, same)}; rename one, "
                f"or name the results in the column 'id' of a manifest"
            )
        elif inside is not None:
            errors[job.path] = (
                f"{job.path}: its result {name} would lie inside the result of {groups[inside][0]}; rename one, "
                f"or name the results in the column 'id' of a manifest"
            )
    return errors


def reserved_part(name: str) -> str | None:
    """Return the part of a result's name that cannot be a name, or None. An empty name is such a part."""
    parts = name.split("/")
    # Working folders and locks start with a dot; "." and ".." are existing folders. A backslash separates folders on
    # Windows, so the record refuses it in the names of files.
    bad = [part for part in parts if not part or part.startswith(".") or "\\" in part]
    bad += [part for part in parts[:1] if part.casefold() in OWN_NAMES]
    # Its polygons would have the name of the file with the left-out areas.
    bad += [part for part in parts[-1:] if part.casefold() + GEOJSON_END == LEFT_OUT]
    return bad[0] if bad else None


def _others(path: Path, paths: Sequence[Path]) -> str:
    """Return the first few of the other paths: each of a thousand slides with the same name would list all others."""
    first = [str(other) for other in paths[:4] if other != path][:3]
    more = len(paths) - 1 - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
