"""Errors of the models package.

ModelError
├── BundleError
│   ├── UnknownBundleError       no shipped bundle of that name and no such folder
│   ├── MissingBundleFileError   a folder without one of its three files
│   ├── InvalidCardError         model.json is no JSON, breaks the schema or has another schema version
│   ├── DigestMismatchError      weights that are not those the card was written for
│   └── WeightsMismatchError     weights that do not fit the architecture the card names
├── ArchitectureError            a backbone, head or encoder that does not exist
├── CamUnavailableError          a CAM method that does not exist, or not for this classifier's head or layer
├── DeviceUnavailableError       a device was asked for that this machine does not have
├── RuntimeUnavailableError      a runtime was asked for that is not installed, or cannot take the model
└── NonFiniteOutputError         a network gave NaN or infinity
"""

from __future__ import annotations

from collections.abc import Sequence


class ModelError(Exception):
    """Anything wrong with a model, its files or its outputs."""


class BundleError(ModelError):
    """A model bundle that cannot be used."""


class UnknownBundleError(BundleError):
    """The name is that of no shipped bundle, and no folder lies at that path."""


class MissingBundleFileError(BundleError):
    """A bundle folder lacks a file."""


class InvalidCardError(BundleError):
    """model.json cannot be read as a model card."""


class DigestMismatchError(BundleError):
    """A weights file is not the one the card names."""


class WeightsMismatchError(BundleError):
    """The weights do not fit the architecture."""


class ArchitectureError(ModelError):
    """A backbone, head or encoder name that nothing is registered for."""


class CamUnavailableError(ModelError):
    """There is no such CAM method, or the classifier's head or the layer asked for does not have it."""


class DeviceUnavailableError(ModelError):
    """The device asked for is not there."""


class RuntimeUnavailableError(ModelError):
    """The runtime asked for is not installed, not for this device or precision, or cannot take the model."""


class NonFiniteOutputError(ModelError):
    """A network's output holds NaN or infinity; `indices` are the positions of those images in the call."""

    def __init__(self, network: str, indices: Sequence[int]) -> None:
        self.network = network
        self.indices = tuple(indices)
        shown = ", ".join(str(index) for index in self.indices[:8]) + (", …" if len(self.indices) > 8 else "")
        super().__init__(
            f"the {network}'s output is NaN or infinite for {len(self.indices)} image(s) of this call (index {shown}); "
            "with reduced precision try float32, else the weights are damaged"
        )
