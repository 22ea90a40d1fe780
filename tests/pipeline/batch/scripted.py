"""Workers whose outcomes are written down beforehand."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob


class StaleError(OSError):
    """A network mount that is stale for a moment."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, "Stale file handle")


@dataclass
class ScriptedWorkers:
    """Workers that raise the errors of a slide's script, one per attempt, and then return a result."""

    script: dict[str, list[Exception]] = field(default_factory=dict)
    slides_at_once: int = 2
    tried: list[str] = field(default_factory=list)
    most: int = 0
    """Largest number of slides in flight."""
    cancelled: bool = False
    before: Callable[[str], object] = lambda _: None
    """Called with the slide's name at the start of each attempt."""
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        self.cancelled = True

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        name = job.path.stem
        with self._lock:
            self.tried.append(name)
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            self.before(name)
            progress("segmenting", 1, 2)
            if self.script.get(name):
                raise self.script[name].pop(0)
            return SlideResult(name, "done", 1.0, {"gland": 0.5}, columns={"tissue_mm2": 1.0})
        finally:
            with self._lock:
                self._running -= 1


def touched(folder: Path, *names: str) -> Path:
    """Make files with the names of slides and return their folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.svs").write_text(name)
    return folder
