"""The request of a flow run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from prefect import runtime
from pydantic import TypeAdapter, ValidationError

from flows.privacy import Redact, as_it_is, without_folders
from pipeline.config import SegmentConfig, misplaced_bool
from pipeline.errors import ConfigError
from pipeline.files import local_path
from pipeline.workers.base import SlideJob


@dataclass(frozen=True)
class BatchRequest:
    """The slides of a flow run, the folder for their results, and the settings."""

    jobs: Sequence[SlideJob]
    output: Path
    model: str
    config: SegmentConfig
    scheduler: str | None = None
    slides_at_once: int | None = None
    """Largest number of slides in flight; None leaves it to the workers."""
    slide_timeout_s: float | None = None
    retry_failed: bool = False
    """Whether to retry slides that failed permanently in an earlier run."""
    hide_paths: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError if a number cannot be used."""
        if self.slides_at_once is not None and self.slides_at_once < 1:
            raise ConfigError(f"slides_at_once is {self.slides_at_once}; it must be 1 or more")

    @cached_property
    def redact(self) -> Redact:
        """Return the function that removes folders from texts, if `hide_paths` is set."""
        folders = {job.path.parent for job in self.jobs} | {self.output, self.output.absolute().parent}
        # Results may lie in folders with the names of the slides' folders.
        names = {name for job in self.jobs for name in (job.name, job.place) if name is not None}
        inner = {name.parent for name in map(PurePosixPath, names) if len(name.parts) > 1}
        folders |= {folder for name in inner for folder in (Path(name), self.output / name)}
        # A slash ends the name of a folder that cannot be searched.
        folders |= {job.path for job in self.jobs if job.result_name.endswith("/")}
        named = (self.model, *(job.model for job in self.jobs), self.scheduler)
        folders |= {Path(file).parent for file in named if file and "://" not in file}
        for job in self.jobs:
            if job.problem:  # the problem of a broken link names the link's target
                with suppress(OSError):
                    folders.add(job.path.readlink().parent)
        return without_folders(folders) if self.hide_paths else as_it_is


def output_folder(output: str) -> Path:
    """Return the folder for the results.

    Raises ConfigError for an address such as s3://bucket/a, and if the path is relative and a Prefect worker started
    the run: the worker deletes the working directory at the end of the run.
    """
    folder = local_path(output, "output")
    if runtime.deployment.id is not None and not folder.is_absolute():
        raise ConfigError(
            f"output is {output!r}; give an absolute path: a Prefect worker deletes the working directory of its runs"
        )
    return folder


def config_from_settings(settings: Mapping[str, Any] | None) -> SegmentConfig:
    """Return the configuration with these settings. Raises ConfigError if a name is unknown or a value is not valid."""
    known = [field.name for field in fields(SegmentConfig)]
    for name in settings or ():
        if name not in known:
            raise ConfigError(f"settings: {name!r} is not a setting; the settings are {', '.join(known)}")
    if settings and (wrong := misplaced_bool(SegmentConfig, settings)):
        raise ConfigError(f"settings: {wrong} is {settings[wrong]!r}; it cannot be true or false")
    adapter = TypeAdapter(SegmentConfig)
    try:
        return adapter.validate_python(dict(settings or {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"settings: {first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error
