"""Files of tensors: the checkpoint and the product of a training stage, and converted weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from pipeline.errors import OutputError, TrainError
from pipeline.files import sync


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replace a file and bring it to the disk, so that a power cut leaves the old or the new one.

    Raises OutputError if the file cannot be written, as on a full disk.
    """
    temporary = file.with_suffix(".tmp")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(on_cpu, temporary, None if metadata is None else dict(metadata))
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except (OSError, safetensors.SafetensorError) as error:
        with suppress(OSError):  # there is no such folder
            temporary.unlink()
        raise OutputError(
            f"{file}: cannot be written ({error}); check that the folder exists, is writable and has space, then run "
            "the same command again"
        ) from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn every error of a stage's file that is damaged, or has other tensors, into a TrainError."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainError(f"{file}: cannot be read ({reason}); delete it to repeat the stage") from error
