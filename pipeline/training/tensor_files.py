"""Files of tensors: the checkpoint and the product of a training stage, and converted weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import OutputError, TrainError
from pipeline.files import replacing


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replace a file and bring it to the disk, so that a power cut leaves the old or the new one.

    Raises OutputError if the file cannot be written, as on a full disk.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(file) as partial:
            safetensors.torch.save_file(on_cpu, partial, None if metadata is None else dict(metadata))
    # A path without a name, such as ".", is a ValueError.
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise OutputError(
            f"{file}: cannot be written ({error}); check that the folder exists, is writable and has space, then run "
            "the same command again"
        ) from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn every error of a stage's file that is damaged, or has other tensors, into a TrainError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the file is fine
    except OSError as error:
        raise TrainError(
            f"{file}: cannot be read ({error.strerror or error}); check the disk and your permissions, then run the "
            "same command again"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainError(f"{file}: cannot be read ({reason}); delete it to repeat the stage") from error
