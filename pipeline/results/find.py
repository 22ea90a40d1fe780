"""Find the results below an output folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.results.names import GROUP, RUN

log = logging.getLogger(__name__)


def result_folders(output: Path) -> list[Path]:
    """Return the folders below `output` that have a `run.json`, sorted.

    Only folders that runs have made are searched: the output folder may hold slides, or be a home folder. Folders that
    this user may not read are left out with a warning.
    """
    return sorted(_search(output))


def _search(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        try:
            is_result, is_group = (path / RUN).is_file(), (path / GROUP).is_file()
        except OSError as error:
            log.warning("%s: cannot be searched for results: %s", path, error.strerror or error)
            continue
        if is_result:
            yield path
        elif is_group:
            yield from _search(path)


def result_name(output: Path, folder: Path) -> str:
    """Return the name of a result below `output`, with slashes, as `summary.csv` has it."""
    return printable_name(folder.relative_to(output).as_posix())


def printable_name(name: str) -> str:
    """Return a name with the bytes escaped that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
