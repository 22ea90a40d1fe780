"""Errors of the pipeline layer.

PipelineError
├── ConfigError    an option or input that cannot be used
├── PlanError      the run would not fit into memory or onto the disk
├── OutputError    results cannot be written, or would replace something else
├── LockedError    another process is at work on the same slide
├── ClusterError   the processes that should do the work are not to be had, or cannot do it
├── WorkerLostError   the process that worked on a slide went away
├── SlideTimeoutError  a slide took longer than it may
├── RegionsFileError  a block's polygons cannot be read back
├── TrainConfigError  a setting of a training run that cannot be used
├── TrainError     a training run that cannot go on
├── DatasetError   a patch data set that cannot be used
│   ├── DatasetFileError       a dataset.toml that does not exist, is no TOML or has wrong keys
│   ├── MissingImagesError     no images where the dataset.toml says, or a split without images
│   ├── LabelError             a label that does not parse, or a table that does not fit the images
│   ├── MaskError              a mask that is missing, of another size or mode, or with values of no class
│   ├── EmptyClassError        a class that no training patch has
│   └── UnreadableImageError   an image that does not open, or too many of them
├── ClassMismatchError  a model of other classes than the data set's
├── ViewError      results that cannot be shown
├── Cancelled      the run was interrupted; it can go on later
└── SampleError    the sample slide is not to be had

Every message says what is wrong, with which file, and what to do next.
"""

from __future__ import annotations

import errno
from typing import Self


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


class ClusterError(PipelineError):
    """The processes that should do the work are not to be had, or cannot do it."""


class WorkerLostError(PipelineError):
    """The process that worked on a slide went away."""


class SlideTimeoutError(PipelineError):
    """A slide took longer than it may."""

    @classmethod
    def after(cls, name: str, seconds: float) -> Self:
        """What to say of a slide that was stopped after this time."""
        return cls(
            f"{name}: took longer than {seconds:g} s and was stopped; run the same command again to go on from the "
            f"finished blocks, with a longer --slide-timeout if it is only large"
        )


class TrainConfigError(PipelineError):
    """A setting of a training run that cannot be used."""


class TrainError(PipelineError):
    """A training run that cannot go on."""


class DatasetError(PipelineError):
    """A patch data set that cannot be used."""


class DatasetFileError(DatasetError):
    """A dataset.toml that does not exist, is no TOML or has wrong keys."""


class MissingImagesError(DatasetError):
    """There are no images where the dataset.toml says, or a split has none."""


class LabelError(DatasetError):
    """A label that does not parse, or a table that does not fit the images."""


class MaskError(DatasetError):
    """A mask that is missing, of another size than its image, of another mode, or with values of no class."""


class EmptyClassError(DatasetError):
    """A class that no training patch has."""


class UnreadableImageError(DatasetError):
    """An image that does not open, or more of them than the limit."""


class ClassMismatchError(PipelineError):
    """The model's classes are not the data set's."""


class ViewError(PipelineError):
    """Results that cannot be shown, or not with this slide."""


class Cancelled(PipelineError):  # noqa: N818 - not an error of anybody's
    """The run was interrupted; it can go on later."""


class SampleError(PipelineError):
    """The sample slide is not to be had from any of its sources."""


_PASSING = frozenset(
    {
        # A network mount that was renewed, hangs or went away for a moment.
        errno.ESTALE,
        errno.EIO,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EAGAIN,
        errno.EBUSY,
        # Others on the machine had taken it all.
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    }
)


def is_transient(error: BaseException | None) -> bool:
    """Whether the same work can succeed later, with nothing changed by anybody.

    That is so for a stale or hanging network mount and a lost worker; not for a slide that is missing, broken or took
    longer than it may, nor for a full disk or wrong settings. An error that was raised from another one is judged by
    that one, too.
    """
    while error is not None:
        if isinstance(error, WorkerLostError):
            return True
        if isinstance(error, OSError) and (
            error.errno in _PASSING or isinstance(error, (TimeoutError, ConnectionError))
        ):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
