"""Two slides in one batch, of which faults hit the first, and moments at which they do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from models.predictor import Predictor
from pipeline.batch.queue import run_batch
from pipeline.config import SegmentConfig
from pipeline.progress import Progress, no_progress
from pipeline.results.slide_result import SlideResult
from pipeline.workers.base import SlideJob
from pipeline.workers.in_process import InProcess
from tests.pipeline.fakes import SMALL, color_predictor, published

CONFIG = replace(SMALL, block_out=80, backend="openslide")
"""A dozen blocks."""


@dataclass(frozen=True)
class Slides:
    """Two slides, and the first one's result without faults."""

    a: Path
    b: Path
    expected: dict[str, bytes]

    def run(self, output: Path, predictor: Predictor | None = None, **options: object) -> list[SlideResult]:
        """Both in one batch; the progress of the first goes to `progress`, each result to `report`."""
        progress: Progress = options.get("progress", no_progress)  # type: ignore[assignment]
        report: Callable[[SlideResult], None] = options.get("report", lambda _: None)  # type: ignore[assignment]
        config: SegmentConfig = options.get("config", CONFIG)  # type: ignore[assignment]
        workers = InProcess(lambda _: predictor or color_predictor(), "any", config)
        jobs = [SlideJob(self.a), SlideJob(self.b)]
        return run_batch(jobs, output, workers, lambda job: progress if job.path == self.a else no_progress, report)

    def check_recovery(self, output: Path, least: int = 0) -> None:
        """The same command once the fault is gone: the bytes of an undisturbed run, and nothing else."""
        a, b = self.run(output)
        assert (a.status, b.status) == ("done", "skipped"), a.error
        assert a.resumed_blocks >= least
        assert published(output / "a") == self.expected
        assert names(output) == ["a", "b", "index.html", "summary.csv"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def thread_names() -> set[str]:
    """Of all threads but those that zarr keeps for its next reads and writes."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def at(stage: str, done: int, act: Callable[[], object]) -> Progress:
    """A progress callback that acts once, at one moment."""
    acted: list[object] = []

    def progress(now: str, steps: int, _: int) -> None:
        if (now, steps) == (stage, done) and not acted:
            acted.append(act())

    return progress
