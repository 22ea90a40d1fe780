"""What a flow run is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import runtime
from pydantic import TypeAdapter, ValidationError

from flows.privacy import Said, as_it_is, without_folders
from pipeline.config import SegmentConfig
from pipeline.errors import ConfigError
from pipeline.workers.base import SlideJob


@dataclass(frozen=True)
class BatchRequest:
    """Slides, where their results go, and how."""

    jobs: Sequence[SlideJob]
    output: Path
    model: str
    config: SegmentConfig
    scheduler: str | None = None
    slides_at_once: int | None = None
    """At most so many; None for as many as the workers take."""
    slide_timeout_s: float | None = None
    hide_paths: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a number that cannot be used."""
        if self.slides_at_once is not None and self.slides_at_once < 1:
            raise ConfigError(f"slides_at_once is {self.slides_at_once}; it must be 1 or more")

    @cached_property
    def said(self) -> Said:
        """What a text may say of the slides' folders."""
        folders = {job.path.parent for job in self.jobs} | {self.output, self.output.absolute().parent}
        return without_folders(folders) if self.hide_paths else as_it_is


def output_folder(output: str) -> Path:
    """Return where results go. Raises ConfigError for a relative path in a run that a worker has started: the folder
    that such a run begins in is deleted when it ends.
    """
    folder = Path(output)
    if runtime.deployment.id is not None and not folder.is_absolute():
        raise ConfigError(f"output is {output!r}; give an absolute path: a worker deletes the folder its runs begin in")
    return folder


def config_from_settings(settings: Mapping[str, Any] | None) -> SegmentConfig:
    """Make a configuration of plain settings. Raises ConfigError on an unknown name or a value that cannot be used."""
    known = [field.name for field in fields(SegmentConfig)]
    for name in settings or ():
        if name not in known:
            raise ConfigError(f"settings: {name!r} is not known; known are {', '.join(known)}")
    adapter = TypeAdapter(SegmentConfig)
    try:
        return adapter.validate_python(dict(settings or {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"settings: {first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error
