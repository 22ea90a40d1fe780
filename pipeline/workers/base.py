"""What is segmented, and what segments it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from pipeline.config import SegmentConfig
from pipeline.progress import Progress
from pipeline.results.slide_result import SlideResult


@dataclass(frozen=True)
class SlideJob:
    """A slide to be segmented, and what a manifest states for it alone."""

    path: Path
    mpp: float | None = None
    """Micrometres per level-0 pixel; None: what the run's settings say."""
    model: str | None = None
    """Name or path of a bundle; None: the run's model."""


Spread = Literal["slides", "blocks"]
"""What a process is given at a time: a whole slide, or a band of blocks of one."""


class Workers(Protocol):
    """Something that segments slides."""

    @property
    def slides_at_once(self) -> int:
        """How many calls of `segment` keep it busy; a cluster's number changes with its size."""
        ...

    def segment(self, job: SlideJob, output: Path, progress: Progress) -> SlideResult:
        """Segment a slide into `output/<stem>` and return when it has ended. Threads may call it at the same time.

        Raises SlideError, ModelError or PipelineError, as `segment_slide` does; `is_transient` tells whether the same
        call can succeed later.
        """
        ...

    def cancel(self) -> None:
        """Let all calls of `segment`, running ones and later ones, raise Cancelled as soon as they can."""
        ...


def job_config(job: SlideJob, config: SegmentConfig) -> SegmentConfig:
    """The settings of one slide: its own mpp wins."""
    return config if job.mpp is None else replace(config, mpp=job.mpp)
