"""Errors about models, their files and their outputs.

WsiSegmentError                      see wsi/errors.py
└── ModelError                       a model, its files or its outputs cannot be used
    ├── BundleError                  a model bundle cannot be used
    │   ├── UnknownBundleError       no shipped bundle has this name, and no folder exists at this path
    │   ├── MissingBundleFileError   the bundle folder lacks one of its three files
    │   ├── InvalidCardError         model.json is not JSON, violates the schema or has another schema version
    │   ├── DigestMismatchError      a card or weights file does not have the expected digest
    │   └── WeightsMismatchError     the weights do not fit the architecture that the model card names
    ├── ArchitectureError            no backbone, head or encoder has this name
    ├── CamUnavailableError          the CAM method does not exist, or does not work with this head or layer
    ├── DeviceUnavailableError       this machine does not have the requested device
    ├── RuntimeUnavailableError      the requested runtime is not installed, or cannot run the model
    ├── ShortageError                the machine has too little memory, threads or file handles to load a model
    └── NonFiniteOutputError         a network returned NaN or infinity
"""

from __future__ import annotations

from collections.abc import Sequence

from wsi.errors import WsiSegmentError, shortage, with_causes


class ModelError(WsiSegmentError):
    """A model, its files or its outputs cannot be used."""


class BundleError(ModelError):
    """A model bundle cannot be used."""


class UnknownBundleError(BundleError):
    """No shipped bundle has this name, and no folder exists at this path."""


class MissingBundleFileError(BundleError):
    """The bundle folder lacks one of its three files."""


class InvalidCardError(BundleError):
    """model.json is not a valid model card."""


class DigestMismatchError(BundleError):
    """A file of the bundle does not have the digest that the card, the package or the user names."""


class WeightsMismatchError(BundleError):
    """The weights do not fit the architecture that the model card names."""


class ArchitectureError(ModelError):
    """No backbone, head or encoder has this name."""


class CamUnavailableError(ModelError):
    """The CAM method does not exist, or does not work with this classifier's head or with the requested layer."""


class DeviceUnavailableError(ModelError):
    """This machine does not have the requested device."""


class RuntimeUnavailableError(ModelError):
    """The requested runtime is not installed, does not support the device or precision, or cannot run the model."""


class ShortageError(ModelError):
    """The machine has too little memory, threads or file handles to load a model."""


class NonFiniteOutputError(ModelError):
    """A network returned NaN or infinity; `indices` are the positions of those images in the call."""

    def __init__(self, network: str, indices: Sequence[int]) -> None:
        self.network = network
        self.indices = tuple(indices)
        shown = ", ".join(str(index) for index in self.indices[:8]) + (", …" if len(self.indices) > 8 else "")
        super().__init__(
            f"the {network}'s output is NaN or infinite for {len(self.indices)} image(s) of this call (index {shown}); "
            "with reduced precision try float32, else the weights are damaged"
        )

    def __reduce__(self) -> tuple[type[NonFiniteOutputError], tuple[str, tuple[int, ...]]]:
        # By default, an exception is pickled with its message as the only argument.
        return type(self), (self.network, self.indices)


def reason_of(error: BaseException) -> str:
    """Return the line of an error's text that has the reason. If a shortage caused the error, that is its reason."""
    error = [error, *(one for one in with_causes(error) if shortage(one))][-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    # OpenVINO's first lines are places in its source code. The last lines of torch are advice for its developers.
    return lines[-1 if lines[0].startswith(("Exception from ", "Check '")) else 0]
