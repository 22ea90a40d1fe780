"""A file system that ignores case, for tests on one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.files import name_key


def ignore_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """List one name of those that differ only in case. The test makes a file or folder for each spelling."""
    iterdir = Path.iterdir

    def listed(folder: Path) -> Iterator[Path]:
        yield from {name_key(path.name): path for path in sorted(iterdir(folder))}.values()

    monkeypatch.setattr(Path, "iterdir", listed)
