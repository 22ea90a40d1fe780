"""Errors about runs: settings, outputs, workers, training and viewing.

WsiSegmentError                   see wsi/errors.py
└── PipelineError                 the work failed, and neither the slide file nor the model is the cause
    ├── ConfigError               an option or input cannot be used
    ├── PlanError                 the run would not fit into memory or onto the disk
    ├── OutputError               results cannot be written, or would replace other results
    │   ├── OtherResultError      a slide's folder holds the result of another run
    │   ├── RunRecordError        a run.json of wsi-segment is damaged
    │   └── LockedError           another process is segmenting the same slide
    ├── ClusterError              the cluster is unreachable or cannot run the job
    ├── WorkerLostError           the worker process of a slide died
    ├── WorkerCrashedError        a slide crashed the process that segmented it
    ├── SlideTimeoutError         a slide exceeded its time limit
    ├── UnpicklableError          a worker raised an error that cannot be sent to this process
    ├── InferenceError            a network failed on its device, or returned NaN or infinity for an image
    ├── RegionsFileError          the saved polygons of a block cannot be read
    ├── MapFileError              the map of a result cannot be read
    ├── TrainConfigError          a training setting cannot be used
    ├── TrainError                a training run cannot continue
    ├── DatasetError              a patch data set cannot be used
    │   ├── DatasetFileError      dataset.toml does not exist, is not valid TOML or has wrong keys
    │   ├── MissingImagesError    the image folder or one of the splits contains no images
    │   ├── LabelError            a label cannot be parsed, or the label table does not fit the images
    │   ├── MaskError             a mask is missing, has the wrong size or mode, or contains an unknown value
    │   ├── EmptyClassError       no training patch has this class
    │   └── UnreadableImageError  an image cannot be opened, or more images than the limit
    ├── ClassMismatchError        the model and the data set have different classes
    ├── ViewError                 the results cannot be shown
    ├── LabelingError             a labels folder or an annotation cannot be used
    ├── Cancelled                 the run was interrupted and can be resumed
    └── SampleError               the sample slide cannot be downloaded from any of its sources

Every message names the problem, the file and the next step.
"""

from __future__ import annotations

import errno
from typing import Self

from wsi.errors import Shortage, WsiSegmentError, with_causes


class PipelineError(WsiSegmentError):
    """The work failed, and neither the slide file nor the model is the cause."""


class ConfigError(PipelineError):
    """An option or input cannot be used."""


class PlanError(PipelineError):
    """The run would not fit into memory or onto the disk."""


class OutputError(PipelineError):
    """Results cannot be written, or would replace other results."""


class OtherResultError(OutputError):
    """A slide's folder holds the result of another run, which stays."""


class RunRecordError(OutputError):
    """A result's run.json was written by wsi-segment, but a value in it is missing or wrong."""


class LockedError(OutputError):
    """Another process is segmenting the same slide."""


class ClusterError(PipelineError):
    """The cluster is unreachable or cannot run the job."""


class WorkerLostError(PipelineError):
    """The worker process of a slide died."""


class WorkerCrashedError(PipelineError):
    """A slide crashed the process that segmented it, and will crash the next process too."""


class SlideTimeoutError(PipelineError):
    """A slide exceeded its time limit."""

    @classmethod
    def after(cls, name: str, seconds: float) -> Self:
        """Return the error of a slide that was stopped after this many seconds."""
        return cls(
            f"{name}: took longer than {seconds:g} s and was stopped; run the same command again to resume after the "
            f"finished blocks, with a longer --slide-timeout if the slide is simply large"
        )


class UnpicklableError(PipelineError):
    """A worker raised an error that cannot be sent to this process; the message names its class."""


class InferenceError(PipelineError):
    """A network failed on its device, or returned NaN or infinity for an image."""


class RegionsFileError(PipelineError):
    """The saved polygons of a block cannot be read."""


class MapFileError(PipelineError):
    """The map of a result cannot be read."""


class TrainConfigError(PipelineError):
    """A training setting cannot be used."""


class TrainError(PipelineError):
    """A training run cannot continue."""


class DatasetError(PipelineError):
    """A patch data set cannot be used."""


class DatasetFileError(DatasetError):
    """dataset.toml does not exist, is not valid TOML or has wrong keys."""


class MissingImagesError(DatasetError):
    """The image folder or one of the splits contains no images."""


class LabelError(DatasetError):
    """A label cannot be parsed, or the label table does not fit the images."""


class MaskError(DatasetError):
    """A mask is missing, has the wrong size or mode, or contains an unknown value."""


class EmptyClassError(DatasetError):
    """No training patch has this class."""


class UnreadableImageError(DatasetError):
    """An image cannot be opened, or more images than the limit."""


class ClassMismatchError(PipelineError):
    """The model and the data set have different classes."""


class ViewError(PipelineError):
    """The results cannot be shown, or not with this slide."""


class LabelingError(PipelineError):
    """A labels folder or an annotation cannot be used."""


class Cancelled(PipelineError):  # noqa: N818 - an interruption is not an error
    """The run was interrupted and can be resumed."""


class SampleError(PipelineError):
    """The sample slide cannot be downloaded from any of its sources."""


SHORTAGE_HELP: dict[Shortage, str] = {
    "out of memory": "lower --batch-size or --num-workers",
    "out of threads": "raise the limit of threads and processes (ulimit -u, or that of the container), "
    "or lower --num-workers",
    "out of file handles": "raise the limit of open files (ulimit -n), or lower --num-workers",
}
"""The next step if the machine has too little of something, for a message."""

_TRANSIENT = frozenset(
    {
        # A network mount was remounted, hangs or was gone for a moment.
        errno.ESTALE,
        errno.EIO,
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.EIO),  # macOS and Windows lack it
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
        # Other processes used up the machine's files or memory.
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    }
)


def is_transient(error: BaseException | None) -> bool:
    """Return whether the same work can succeed later although nobody changes anything.

    Stale or hanging network mounts and lost workers are transient. Missing or broken slides, timeouts, full disks and
    wrong settings are not. The errors that caused `error` count too.
    """
    return any(
        isinstance(one, WorkerLostError)
        or (isinstance(one, OSError) and (one.errno in _TRANSIENT or isinstance(one, (TimeoutError, ConnectionError))))
        for one in with_causes(error)
    )
