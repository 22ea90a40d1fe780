"""Checkpoints with the names of the published code are built here; the authors' own files are not needed.

Shape suffixes: N batch, C channels, H and W the image.
"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.segmenter import build_segmenter, encoder_network
from pipeline.errors import TrainError
from pipeline.training.checkpoints import backbone_tensors, main, network_shapes, read_checkpoint
from pipeline.training.inputs import load_start


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """Return a ResNet-18 with random weights and statistics."""
    torch.manual_seed(0)
    network = encoder_network(build_segmenter("resnet18", 2, 5))
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_()
    return network


def from_zero(network: nn.Module) -> nn.Module:
    """Return a copy of a network with other weights."""
    other = copy.deepcopy(network)
    for tensor in other.state_dict().values():
        tensor.zero_()
    return other


def published_resnet38d() -> dict[str, Tensor]:
    """Return tensors of one stored number each, with the names and shapes of the release, from its structure."""
    shapes: dict[str, tuple[int, ...]] = {"conv1a.weight": (64, 3, 3, 3), "fc8.weight": (4, 4096, 1, 1)}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{of}": (channels,) for of in ("weight", "bias", "running_mean", "running_var")})

    stages = [("b2", 64, 128, 128, 2), ("b3", 128, 256, 256, 2), ("b4", 256, 512, 512, 5), ("b5", 512, 512, 1024, 2)]
    for stage, inputs, middle, outputs, more in stages:
        for n in range(more + 1):
            name, channels = (stage, inputs) if n == 0 else (f"{stage}_{n}", outputs)
            norm(f"{name}.bn_branch2a", channels)
            norm(f"{name}.bn_branch2b1", middle)
            shapes[f"{name}.conv_branch2a.weight"] = (middle, channels, 3, 3)
            shapes[f"{name}.conv_branch2b1.weight"] = (outputs, middle, 3, 3)
        shapes[f"{stage}.conv_branch1.weight"] = (outputs, inputs, 1, 1)
    for name, inputs, outputs in (("b6", 1024, 2048), ("b7", 2048, 4096)):
        norm(f"{name}.bn_branch2a", inputs)
        norm(f"{name}.bn_branch2b1", outputs // 4)
        norm(f"{name}.bn_branch2b2", outputs // 2)
        shapes[f"{name}.conv_branch2a.weight"] = (outputs // 4, inputs, 1, 1)
        shapes[f"{name}.conv_branch2b1.weight"] = (outputs // 2, outputs // 4, 3, 3)
        shapes[f"{name}.conv_branch2b2.weight"] = (outputs, outputs // 2, 1, 1)
        shapes[f"{name}.conv_branch1.weight"] = (outputs, inputs, 1, 1)
    norm("bn7", 4096)
    return {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}


def test_a_checkpoint_of_the_release_has_every_tensor_of_resnet38d_and_no_other_but_its_head(tmp_path: Path) -> None:
    published = published_resnet38d()
    file = tmp_path / "stage1_checkpoint_trained_on_bcss.pth"
    torch.save(published, file)
    read = read_checkpoint(file)
    shapes = network_shapes("resnet38d")
    assert {name for name in shapes if not name.endswith("num_batches_tracked")} == set(read) - {"fc8.weight"}
    assert all(read[name].shape == shape for name, shape in shapes.items() if name in read)


@pytest.mark.full
def test_resnet38d_starts_from_a_converted_checkpoint_of_the_release(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Backbone("resnet38d").net
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    torch.save(state | {"module.fc8.weight": torch.zeros(4, 4096, 1, 1)}, tmp_path / "release.pth")
    main([str(tmp_path / "release.pth"), "resnet38d", "-o", str(tmp_path / "start.safetensors")])
    target = Backbone("resnet38d").net
    load_start(target, str(tmp_path / "start.safetensors"), "network")
    assert sum(parameter.numel() for parameter in target.parameters()) == 105_070_912
    x_NCHW = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        for found, expected in zip(target.eval()(x_NCHW), source.eval()(x_NCHW), strict=True):
            assert torch.equal(found, expected)


def test_the_encoder_starts_from_the_backbone_of_a_published_deeplab(
    encoder: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = encoder.state_dict()
    state = {f"backbone.{name}": tensor for name, tensor in source.items() if "num_batches" not in name}
    state |= {"aspp.conv1.weight": torch.zeros(2), "decoder.last_conv.8.bias": torch.zeros(4)}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "deeplab.pth.tar")
    main([str(tmp_path / "deeplab.pth.tar"), "resnet18", "-o", str(tmp_path / "start.safetensors")])
    assert f"{len(source)} tensors of resnet18" in capsys.readouterr().out
    target = from_zero(encoder)
    load_start(target, str(tmp_path / "start.safetensors"), "network")
    assert all(torch.equal(tensor, source[name]) for name, tensor in target.state_dict().items())


def test_an_imagenet_classifier_of_torchvision_is_an_encoder_without_its_last_layer(encoder: nn.Module) -> None:
    state = encoder.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    assert set(backbone_tensors(state, "resnet18")) == set(state) - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": None}, r"1 of 120 tensors are missing, such as layer1\.0\.conv1\.weight"),
        ({"layer9.weight": torch.zeros(1)}, r"1 of 120 tensors are not in the network, such as layer9\.weight"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"1 of 120 tensors are of another shape, such as conv1\.weight"),
    ],
)
def test_a_checkpoint_must_fit_tensor_by_tensor(
    encoder: nn.Module, change: dict[str, Tensor | None], message: str
) -> None:
    state = {**encoder.state_dict(), **change}
    with pytest.raises(TrainError, match=message):
        backbone_tensors({name: tensor for name, tensor in state.items() if tensor is not None}, "resnet18")


class Payload:
    """An object whose unpickling runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Payload(tmp_path / "pwned")}}, tmp_path / "evil.pth")
    with pytest.raises(TrainError, match=r"evil\.pth: is not a checkpoint with only tensors and plain values"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


# PyTorch's reader raises KeyError or IndexError for the last three.
@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", pickle.dumps(np.zeros(3), 2), b"hello world\n", b"hq\0.", b"....."]
)
def test_the_error_names_a_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(
        TrainError,
        match=r"broken\.pth: is not a checkpoint with only tensors and plain values; pass a file that contains only a",
    ):
        read_checkpoint(tmp_path / "broken.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(TrainError, match=r"list\.pth: does not contain a state dict"):
        read_checkpoint(tmp_path / "list.pth")


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_the_converter_names_an_output_that_cannot_be_written(encoder: nn.Module, tmp_path: Path, folder: str) -> None:
    torch.save(encoder.state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / folder / "start.safetensors"
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "resnet18.pth"), "resnet18", "-o", str(output)])
    assert str(ended.value).startswith(f"{output}: cannot be written (")
    assert "check that the folder exists, is writable and has space" in str(ended.value)


def test_the_converter_names_a_damaged_checkpoint_once(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "broken.pth"), "resnet18", "-o", str(tmp_path / "start.safetensors")])
    assert str(ended.value).count("broken.pth") == 1


def test_training_refuses_a_pickle_and_names_the_converter(tmp_path: Path) -> None:
    file = tmp_path / "start.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(TrainError, match=r"start\.pth: not a safetensors file; convert it with python -m pipeline"):
        load_start(nn.Linear(1, 1), str(file), "network")
    safetensors.torch.save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, tmp_path / "start.safetensors")
    linear = nn.Linear(1, 1)
    load_start(linear, str(tmp_path / "start.safetensors"), "network")
    assert linear.weight.item() == 1
