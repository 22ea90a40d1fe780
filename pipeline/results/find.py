"""Find the results below an output folder."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipeline.files import printable_name
from pipeline.results.names import GROUP, RUN
from wsi.paths import kind_of

log = logging.getLogger(__name__)


def result_folders(output: Path) -> list[Path]:
    """Return the folders below `output` that have a `run.json`, sorted.

    Only folders that runs have made are searched: the output folder may hold slides, or be a home folder. Linked
    folders are searched too, and each folder once. Folders that this user may not read are left out with a warning.

    Raises OSError if `output` itself cannot be read.
    """
    return sorted(_search(output))


def _search(output: Path) -> Iterator[Path]:
    folders, searched = deque([output]), set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in searched:
                continue
            searched.add((facts.st_dev, facts.st_ino))
            content = [path for path in folder.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            if folder == output:
                raise
            _warn(folder, error)
            continue
        for path in sorted(content):
            try:
                is_result, is_group = kind_of(path / RUN) == "file", kind_of(path / GROUP) == "file"
                is_link = path.is_symlink()
            except OSError as error:
                _warn(path, error)
                continue
            if is_result:
                yield path
            elif is_group and is_link:
                # Searched last, so that results have the names by which the summary lists them.
                folders.appendleft(path)
            elif is_group:
                folders.append(path)


def _warn(folder: Path, error: OSError) -> None:
    log.warning("%s: cannot be searched for results: %s", folder, error.strerror or error)


def result_name(output: Path, folder: Path) -> str:
    """Return the name of a result below `output`, with slashes, as `summary.csv` has it."""
    return printable_name(folder.relative_to(output).as_posix())
