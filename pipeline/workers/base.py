"""The job of segmenting one slide, and the interface of all workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from pipeline.config import SegmentConfig
from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult


@dataclass(frozen=True)
class SlideJob:
    """A slide to segment, with the values that a manifest gives for this slide alone."""

    path: Path
    mpp: float | None = None
    """Micrometers per level-0 pixel. None: the value of the run's settings."""
    model: str | None = None
    """Name or path of a bundle. None: the run's model."""
    name: str | None = None
    """Name of the result: a path below the output folder, with slashes. None: the file's name without its ending."""
    place: str | None = field(default=None, compare=False)
    """Where the slide lies below the folder or manifest that named it, without its ending: the name of the result if
    another slide has the short name. None: the name cannot change, or the slide was named by itself."""
    problem: str = field(default="", compare=False)
    """Why there is nothing to attempt, such as a link that leads nowhere: the job fails with this text."""

    @property
    def result_name(self) -> str:
        """Return the name of the result, with slashes: the path of its folder below the output folder."""
        return self.path.stem if self.name is None else self.name


Spread = Literal["slides", "blocks"]
"""The work of one task: a whole slide, or a band of a slide's blocks."""


class Workers(Protocol):
    """Segments slides."""

    @property
    def slides_at_once(self) -> int:
        """Return how many concurrent calls of `segment` keep the workers busy. The number of a cluster can change."""
        ...

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """Segment a slide into `output/<job.result_name>` and return its result. Threads may call this concurrently.

        Raises the errors of `segment_slide`. `is_transient` returns whether the same call can succeed later.
        """
        ...

    def cancel(self) -> None:
        """Make every running and later call of `segment` raise Cancelled as soon as possible."""
        ...


def job_config(job: SlideJob, config: SegmentConfig) -> SegmentConfig:
    """Return the settings of one slide. The mpp of the job overrides the mpp of the run."""
    return config if job.mpp is None else replace(config, mpp=job.mpp)
