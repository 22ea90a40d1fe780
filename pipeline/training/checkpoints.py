"""Convert a published PyTorch checkpoint to a weights file for `wsi-train`.

    python -m pipeline.training.checkpoints stage1_checkpoint_trained_on_bcss.pth resnet38d -o resnet38d.safetensors
    python -m pipeline.training.checkpoints resnet101.pth resnet101 -o resnet101.safetensors

The second argument is the network: `resnet38d`, an encoder of segmentation-models-pytorch, or "tu-" and a timm name.
The checkpoints of Han et al. 2022 contain a state dict, or a dict with a state dict under "state_dict". Their names of
ResNet-38d's tensors are ours, and their DeepLab has the tensors of its ResNet-101 below "backbone.".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone
from models.segmenter import build_segmenter, encoder_network
from pipeline.errors import TrainError
from pipeline.training.tensor_files import write_tensors
from wsi.errors import WsiSegmentError

PREFIXES = ("module.", "backbone.")
"""Prefixes of the names of a published state dict: by DataParallel, and by the DeepLab of Han et al. 2022."""

OTHER_PARTS = ("fc", "classifier.", "head.", "aspp.", "decoder.")
"""Beginnings of the names of tensors that do not belong to a backbone."""

_COUNTER = "num_batches_tracked"
"""A batch norm's counter of batches, which old checkpoints do not contain and no result depends on."""


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that `torch.save` wrote, without the prefixes of their names.

    Nothing but tensors and plain values is unpickled, so that a file cannot run code. Raises TrainError for a file that
    is missing, damaged, or contains other objects.
    """
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainError(f"{file}: cannot be read: {error.strerror}") from error
    # Files of other kinds raise almost any error. PyTorch's text is left out: it advises to run code from the file.
    except Exception as error:
        raise TrainError(
            f"{file}: is not a checkpoint with only tensors and plain values; pass a file that contains only a "
            "state dict"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TrainError(f"{file}: does not contain a state dict; pass a file that contains only a state dict")
    return {_without_prefixes(str(name)): tensor for name, tensor in content.items()}


def backbone_tensors(tensors: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """Return the tensors of a backbone, complete and without the tensors of other parts.

    Raises TrainError if a tensor of the network is missing or has another shape, or if a tensor is left over that is
    not one of `OTHER_PARTS`. Raises ArchitectureError if the network does not exist.
    """
    shapes = network_shapes(network)
    missing = [name for name in shapes if name not in tensors and not name.endswith(_COUNTER)]
    unknown = [name for name in tensors if name not in shapes and not name.startswith(OTHER_PARTS)]
    wrong = [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    for problem, names in (("missing", missing), ("not in the network", unknown), ("of another shape", wrong)):
        if names:
            raise TrainError(
                f"the checkpoint does not fit {network}: {len(names)} of {len(shapes)} tensors are {problem}, such as "
                f"{', '.join(names[:3])}; name the network that the checkpoint was made for"
            )
    return {name: tensors.get(name, torch.zeros((), dtype=torch.int64)).contiguous() for name in shapes}


def network_shapes(network: str) -> dict[str, torch.Size]:
    """Return the names and shapes of a backbone's tensors. Raises ArchitectureError for an unknown network."""
    with torch.device("meta"):
        if network == "resnet38d":
            built: Any = Backbone(network).net
        else:
            built = encoder_network(build_segmenter(network, 2, 5))
    return {name: tensor.shape for name, tensor in built.state_dict().items()}


def _without_prefixes(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="file that torch.save wrote")
    parser.add_argument("network", help="resnet38d, or an encoder of segmentation-models-pytorch")
    parser.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        tensors = backbone_tensors(read_checkpoint(options.checkpoint), options.network)
        write_tensors(options.output, tensors)
    except WsiSegmentError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{options.output}: {len(tensors)} tensors of {options.network}\n")


if __name__ == "__main__":
    main()
