"""Errors of the pipeline layer.

PipelineError
├── ConfigError    an option or input that cannot be used
├── PlanError      the run would not fit into memory or onto the disk
├── OutputError    results cannot be written, or would replace something else
├── LockedError    another process is at work on the same slide
├── RegionsFileError  a block's polygons cannot be read back
├── Cancelled      the run was interrupted; it can go on later
└── SampleError    the sample slide is not to be had

Every message says what is wrong, with which file, and what to do next.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of everything that ends the work on a slide and is no fault of the slide or the model."""


class ConfigError(PipelineError):
    """An option or input that cannot be used."""


class PlanError(PipelineError):
    """The run would not fit into memory or onto the disk."""


class OutputError(PipelineError):
    """Results cannot be written, or would replace something else."""


class LockedError(OutputError):
    """Another process is at work on the same slide."""


class Cancelled(PipelineError):  # noqa: N818 - not an error of anybody's
    """The run was interrupted; it can go on later."""


class SampleError(PipelineError):
    """The sample slide is not to be had from any of its sources."""
