"""Loaded by the worker processes of a test: a reader that crashes as native code does, on slides named "crash…"."""

from __future__ import annotations

import ctypes
from pathlib import Path

from wsi.readers import READERS, OpenSlideReader


def _opened(path: Path) -> OpenSlideReader:
    if path.stem.startswith("crash"):
        ctypes.string_at(0)
    return OpenSlideReader(path)


READERS["openslide"] = _opened
