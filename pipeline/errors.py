"""Errors of the pipeline layer.

PipelineError
├── ConfigError    an option or input that cannot be used
├── PlanError      the run would not fit into memory or onto the disk
├── OutputError    results cannot be written, or would replace something else
├── LockedError    another process is at work on the same slide
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


class Cancelled(PipelineError):  # noqa: N818 - not an error of anybody's
    """The run was interrupted; it can go on later."""


class SampleError(PipelineError):
    """The sample slide is not to be had from any of its sources."""
