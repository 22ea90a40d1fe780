"""Compare a result's files with the sizes and digests that the run recorded.

`run.json` has the facts about each file beside it, and `chunks.tsv` those about each file of the map. The check reads
both from scratch and shares no code with the writer on purpose.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LISTING = "chunks.tsv"
_CHUNK_BYTES = 1 << 20

Recorded = dict[str, tuple[str, int]]
"""SHA-256 and size of each file, by its name."""


def changed_values(run: Mapping[str, Any]) -> list[str]:
    """Return a sentence if the values of `run.json` are not those that the run wrote."""
    values = {key: value for key, value in run.items() if key != "sha256"}
    if isinstance(values.get("slide"), dict):
        values["slide"] = {key: value for key, value in values["slide"].items() if key != "path"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")
    return [] if hashlib.sha256(canonical).hexdigest() == run.get("sha256") else ["has other values than the run wrote"]


def changed_files(folder: Path, run: Mapping[str, Any], *, quick: bool = False) -> dict[Path, list[str]]:
    """Return what is wrong with each file of a result: missing, of another size, of other content, or not listed.

    `quick`: compare sizes only. `chunks.tsv` is read in any case. Raises LookupError, ValueError or TypeError if
    `run.json` does not have digests, because an older version wrote it or it is damaged.
    """
    outputs = [name for name in run["outputs"] if name != "run.json"]
    recorded = {name: (facts["sha256"], _size(facts["bytes"])) for name, facts in run["digests"].items()}
    found: dict[Path, list[str]] = {}
    for name in outputs:
        path = folder / name
        if name in recorded:
            found[path] = _changes(path, *recorded[name], quick=quick and name != LISTING)
        elif wrong := _without_digest(path):
            found[path] = wrong
    for name in outputs:
        if folder / name not in found and not found.get(folder / LISTING, ["is missing"]):
            found[folder / name] = _changes_of_map(folder / name, _listed(folder / LISTING), quick=quick)
    return found


def is_of_desktop(name: str) -> bool:
    """Return whether a file with this name in a map was written by a desktop, such as .DS_Store and ._0 by Finder.

    Zarr's own hidden files begin with ".z".
    """
    return name.startswith(".") and not name.startswith(".z")


def _size(recorded: object) -> int:
    if not isinstance(recorded, int) or isinstance(recorded, bool):
        raise TypeError(f"{recorded!r} is not a number of bytes")
    return recorded


def _without_digest(path: Path) -> list[str]:
    """Return what is wrong with an output that has no digest of its own. Only a folder may lack one."""
    try:
        return [] if stat.S_ISDIR(path.stat().st_mode) else ["does not have a digest in run.json"]
    except FileNotFoundError:
        return ["is missing"]
    except OSError as error:  # such as a name that is too long
        return [f"cannot be read: {error.strerror or error}"]


def _changes_of_map(root: Path, listed: Recorded, *, quick: bool) -> list[str]:
    wrong = [f"{name} {text}" for name, facts in listed.items() for text in _changes(root / name, *facts, quick=quick)]
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return wrong + [
        f"{name} is not a file of the result"
        for name in sorted(present - set(listed))
        if not is_of_desktop(name.rpartition("/")[2])
    ]


def _changes(path: Path, sha256: str, size: int, *, quick: bool) -> list[str]:
    try:
        if not path.is_file():
            return ["is missing"]
        if path.stat().st_size != size:
            return [f"has {path.stat().st_size} bytes instead of {size}"]
        if not quick and _sha256(path) != sha256:
            return ["has other content than the run wrote"]
    except OSError as error:
        return [f"cannot be read: {error.strerror or error}"]
    return []


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _listed(path: Path) -> Recorded:
    found: Recorded = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sha256, size, name = line.split("\t")
        found[name] = (sha256, int(size))
    return found
