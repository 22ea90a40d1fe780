"""What of a run's files would outlast a power cut: its steps replayed on a disk that keeps nothing but what was synced.

A worst case that POSIX allows: the content of a file is safe from its fsync on, its name from the fsync of its folder
on. A rename is whole or has not happened. Removals always happen here.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

Event = tuple[str, ...]
"""A step of a run as `victim.Steps` writes it: its kind, and paths relative to the output."""

THREADS = 8
"""At least as many as a run has: each may be at a step when the run dies."""


class Disk:
    """The files below one output folder; what is there at the beginning is safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        there = {str(path.relative_to(root)) for path in root.rglob("*")} if root.exists() else set()
        self._contents = set(there)
        """Files whose content is safe."""
        self._names = set(there)
        """Files and folders whose entry in their folder is safe."""
        self._moved: dict[str, str] = {}
        """New name -> old name of renames that are not safe."""

    def replay(self, events: Iterable[Event]) -> None:
        """Take what a run has done."""
        events = list(events)
        for left, event in zip(reversed(range(len(events))), events, strict=True):
            # A run may have died between noting one of its last steps and doing it.
            undone = event[0] == "rename" and (self.root / event[1]).exists() and not (self.root / event[2]).exists()
            if left >= THREADS or not undone:
                self.step(*event)

    def step(self, kind: str, *paths: str) -> None:
        """Take one step."""
        if kind == "write":
            self._contents.discard(paths[0])
        elif kind in ("mkdir", "remove", "rmdir"):
            self._forget(paths[0])
        elif kind in ("rename", "link"):
            self._rename(*paths)
        elif kind == "synced":
            self._contents.add(paths[0])
        elif kind == "synced folder":
            self._names |= set(paths[1:])
            self._moved = {new: old for new, old in self._moved.items() if new not in paths[1:]}

    def is_safe(self, name: str) -> bool:
        """Whether a file would be there after a power cut, with what is in it."""
        return name in self._contents and self.has_name(name)

    def has_name(self, name: str) -> bool:
        """Whether a file or folder would be found by its name after a power cut."""
        path = Path(name)
        return all(str(part) in self._names for part in (path, *path.parents) if part != Path())

    def cut_power(self, rng: random.Random) -> None:
        """Take from the folder what is not safe, or a part of it: a disk may be further than it must be."""
        for new, old in reversed(list(self._moved.items())):
            source, target = self.root / old, self.root / new
            if new in self._names or not target.exists() or not source.parent.exists():
                continue
            if not source.exists() and rng.random() < 0.5:
                target.rename(source)
                self._rename(new, old)
                self._names.add(old)
            else:
                self._names.add(new)
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if not path.exists():
                continue
            if name not in self._names and rng.random() < 0.5:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_file() and name not in self._contents and rng.random() < 0.7:
                size = path.stat().st_size
                kept = rng.randint(0, size)
                path.write_bytes(path.read_bytes()[:kept] + bytes(rng.choice((0, size - kept))))
        # What has survived is on the disk.
        there = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        self._contents, self._names, self._moved = set(there), set(there), {}

    def _forget(self, name: str) -> None:
        below = f"{name}/"
        for known in (self._contents, self._names):
            known -= {one for one in known if one == name or one.startswith(below)}
        self._moved.pop(name, None)

    def _rename(self, old: str, new: str) -> None:
        replaced = new in self._names
        below = f"{old}/"
        for known in (self._contents, self._names):
            moved = {one for one in known if one == old or one.startswith(below)}
            known -= moved
            known |= {new + one.removeprefix(old) for one in moved}
        if not replaced:  # else one of both files is found by this name
            self._names.discard(new)
        self._moved.pop(old, None)
        self._moved[new] = old
