"""Compare ResNet-38d with a table of its layers and with its blocks written out.

Shape suffixes: N batch, C channels, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.resnet38d import BottleneckBlock, ResBlock, ResNet38d

Floats = NDArray[np.float64]

# name, channels in, inside and out, and whether the shortcut has a convolution
RES_BLOCKS = [
    ("b2", 64, 128, 128, True),
    *((name, 128, 128, 128, False) for name in ("b2_1", "b2_2")),
    ("b3", 128, 256, 256, True),
    *((name, 256, 256, 256, False) for name in ("b3_1", "b3_2")),
    ("b4", 256, 512, 512, True),
    *((f"b4_{i}", 512, 512, 512, False) for i in range(1, 6)),
    ("b5", 512, 512, 1024, True),
    *((name, 1024, 512, 1024, False) for name in ("b5_1", "b5_2")),
]
BOTTLENECKS = [("b6", 1024, 2048), ("b7", 2048, 4096)]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the trained tensors, from the table."""
    shapes: dict[str, tuple[int, ...]] = {"conv1a.weight": (64, 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{of}": (channels,) for of in ("weight", "bias", "running_mean", "running_var")})

    for name, inputs, middle, outputs, shortcut in RES_BLOCKS:
        norm(f"{name}.bn_branch2a", inputs)
        shapes[f"{name}.conv_branch2a.weight"] = (middle, inputs, 3, 3)
        norm(f"{name}.bn_branch2b1", middle)
        shapes[f"{name}.conv_branch2b1.weight"] = (outputs, middle, 3, 3)
        if shortcut:
            shapes[f"{name}.conv_branch1.weight"] = (outputs, inputs, 1, 1)
    for name, inputs, outputs in BOTTLENECKS:
        norm(f"{name}.bn_branch2a", inputs)
        shapes[f"{name}.conv_branch2a.weight"] = (outputs // 4, inputs, 1, 1)
        norm(f"{name}.bn_branch2b1", outputs // 4)
        shapes[f"{name}.conv_branch2b1.weight"] = (outputs // 2, outputs // 4, 3, 3)
        norm(f"{name}.bn_branch2b2", outputs // 2)
        shapes[f"{name}.conv_branch2b2.weight"] = (outputs, outputs // 2, 1, 1)
        shapes[f"{name}.conv_branch1.weight"] = (outputs, inputs, 1, 1)
    norm("bn7", 4096)
    return shapes


def randomise(network: nn.Module) -> None:
    """Draw weights that keep the size of activations, and statistics with which every batch norm has an effect."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


@pytest.fixture(scope="module")
def network() -> Iterator[ResNet38d]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = ResNet38d()
        randomise(network)
        yield network.eval()


@pytest.fixture(scope="module")
def skeleton() -> ResNet38d:
    """Return the network with shapes but without values."""
    with torch.device("meta"):
        return ResNet38d()


def test_tensors_have_the_names_and_shapes_of_the_published_weights(skeleton: ResNet38d) -> None:
    actual = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    counters = {name for name in actual if name.endswith(".num_batches_tracked")}
    assert {name: shape for name, shape in actual.items() if name not in counters} == published_shapes()


def test_the_parameter_count_equals_that_of_the_table(skeleton: ResNet38d) -> None:
    shapes = published_shapes()
    from_table = sum(math.prod(shape) for name, shape in shapes.items() if ".running" not in name)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    # By hand: kernels 3·64·9; 9·(64+5·128)·128 … without the 38 batch norms' scale and shift.
    kernels = 9 * (
        3 * 64
        + (64 + 5 * 128) * 128
        + (128 + 5 * 256) * 256
        + (256 + 11 * 512) * 512
        + (512 * 512 + 512 * 1024 + 2 * (1024 * 512 + 512 * 1024))
        + 512 * 1024
        + 1024 * 2048
    )
    kernels += 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1024
    kernels += 1024 * 512 + 1024 * 2048 + 1024 * 2048 + 2048 * 1024 + 2048 * 4096 + 2048 * 4096
    norms = 2 * sum(module.num_features for module in skeleton.modules() if isinstance(module, nn.BatchNorm2d))
    assert count == from_table == kernels + norms == 105_070_912


def test_stages_at_224_pixels_have_output_stride_8(skeleton: ResNet38d) -> None:
    stages = skeleton(torch.empty(2, 3, 224, 224, device="meta"))
    assert [tuple(stage.shape) for stage in stages] == [(2, 512, 28, 28), (2, 1024, 28, 28), (2, 4096, 28, 28)]


def slow_conv(x_Chw: Floats, weight: Floats, stride: int = 1, dilation: int = 1) -> Floats:
    """Convolve cell by cell, with zeros around the image."""
    outputs, _, side, _ = weight.shape
    _, height, width = x_Chw.shape
    result = np.zeros((outputs, -(-height // stride), -(-width // stride)))
    for y in range(result.shape[1]):
        for x in range(result.shape[2]):
            for i in range(side):
                for j in range(side):
                    v, u = y * stride + (i - side // 2) * dilation, x * stride + (j - side // 2) * dilation
                    if 0 <= v < height and 0 <= u < width:
                        result[:, y, x] += weight[:, :, i, j] @ x_Chw[:, v, u]
    return result


def slow_active(x_Chw: Floats, state: dict[str, Floats], name: str) -> Floats:
    """Return the ReLU of the batch norm with stored statistics."""
    result = np.empty_like(x_Chw)
    for c in range(len(x_Chw)):
        scale = state[f"{name}.weight"][c] / math.sqrt(state[f"{name}.running_var"][c] + 1e-5)
        result[c] = (x_Chw[c] - state[f"{name}.running_mean"][c]) * scale + state[f"{name}.bias"][c]
    return np.maximum(result, 0)


def random_block(block: nn.Module) -> tuple[nn.Module, dict[str, Floats], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        randomise(block)
        x_NChw = torch.randn(2, 4, 9, 7)
    return block.eval(), {name: value.double().numpy() for name, value in block.state_dict().items()}, x_NChw


@pytest.mark.parametrize(
    ("outputs", "stride", "dilations"), [(4, 1, (1, 1)), (6, 1, (1, 2)), (4, 2, (1, 1)), (4, 1, (2, 2))]
)
def test_residual_block_agrees_with_its_definition(outputs: int, stride: int, dilations: tuple[int, int]) -> None:
    block, state, x_NChw = random_block(ResBlock(4, 5, outputs, stride=stride, dilations=dilations))
    with torch.no_grad():
        y_NChw, active_NChw = block(x_NChw)
    for n, x_Chw in enumerate(x_NChw.double().numpy()):
        active_Chw = slow_active(x_Chw, state, "bn_branch2a")
        branch_Chw = slow_conv(active_Chw, state["conv_branch2a.weight"], stride, dilations[0])
        branch_Chw = slow_active(branch_Chw, state, "bn_branch2b1")
        branch_Chw = slow_conv(branch_Chw, state["conv_branch2b1.weight"], 1, dilations[1])
        keeps_shape = outputs == 4 and stride == 1
        shortcut = x_Chw if keeps_shape else slow_conv(active_Chw, state["conv_branch1.weight"], stride)
        np.testing.assert_allclose(y_NChw[n], shortcut + branch_Chw, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(active_NChw[n], active_Chw, rtol=1e-4, atol=1e-5)


def test_bottleneck_block_agrees_with_its_definition() -> None:
    block, state, x_NChw = random_block(BottleneckBlock(4, 8, dilation=4, dropout=0.5))
    with torch.no_grad():
        y_NChw, active_NChw = block(x_NChw)
    for n, x_Chw in enumerate(x_NChw.double().numpy()):
        active_Chw = slow_active(x_Chw, state, "bn_branch2a")
        branch_Chw = slow_active(slow_conv(active_Chw, state["conv_branch2a.weight"]), state, "bn_branch2b1")
        branch_Chw = slow_conv(branch_Chw, state["conv_branch2b1.weight"], 1, 4)
        branch_Chw = slow_conv(slow_active(branch_Chw, state, "bn_branch2b2"), state["conv_branch2b2.weight"])
        shortcut_Chw = slow_conv(active_Chw, state["conv_branch1.weight"])
        np.testing.assert_allclose(y_NChw[n], shortcut_Chw + branch_Chw, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(active_NChw[n], active_Chw, rtol=1e-4, atol=1e-5)


def test_a_bottleneck_block_drops_channels_before_its_second_and_third_convolution() -> None:
    block = BottleneckBlock(4, 256, dilation=1, dropout=0.25)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0][0].flatten(1))

    with torch.random.fork_rng():
        torch.manual_seed(6)
        randomise(block)
        x_NChw = torch.randn(1, 4, 9, 7)
        block.conv_branch2b1.register_forward_pre_hook(keep)
        block.conv_branch2b2.register_forward_pre_hook(keep)
        with torch.no_grad():
            block.eval()(x_NChw)
            for module in block.modules():
                module.train(not isinstance(module, nn.BatchNorm2d))
            block(x_NChw)
    second, third, second_dropped, third_dropped = seen
    kept = second_dropped.any(dim=1)
    assert torch.allclose(second_dropped[kept], second[kept] / 0.75)
    for before, after in ((second, second_dropped), (third, third_dropped)):
        alive = before.any(dim=1)
        assert float((~after.any(dim=1))[alive].float().mean()) == pytest.approx(0.25, abs=0.12)


def by_table(state: dict[str, Tensor], x_NCHW: Tensor) -> dict[str, Tensor]:
    """Return, for each block and for bn7, its input after the pre-activation, computed from the stored tensors."""

    def active(x_NChw: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{of}"] for of in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x_NChw, mean, variance, weight, bias))

    def conv(x_NChw: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x_NChw, weight, None, stride, weight.shape[2] // 2 * dilation, dilation)

    inputs: dict[str, Tensor] = {}
    y = conv(x_NCHW, "conv1a")
    for name, *_, shortcut in RES_BLOCKS:
        a = inputs[name] = active(y, f"{name}.bn_branch2a")
        stride = 2 if name in ("b2", "b3", "b4") else 1
        first, second = {"b5": (1, 2), "b5_1": (2, 2), "b5_2": (2, 2)}.get(name, (1, 1))
        kept = conv(a, f"{name}.conv_branch1", stride) if shortcut else y
        branch = active(conv(a, f"{name}.conv_branch2a", stride, first), f"{name}.bn_branch2b1")
        y = kept + conv(branch, f"{name}.conv_branch2b1", 1, second)
    for name, *_ in BOTTLENECKS:
        a = inputs[name] = active(y, f"{name}.bn_branch2a")
        branch = active(conv(a, f"{name}.conv_branch2a"), f"{name}.bn_branch2b1")
        branch = active(conv(branch, f"{name}.conv_branch2b1", 1, 4), f"{name}.bn_branch2b2")
        y = conv(a, f"{name}.conv_branch1") + conv(branch, f"{name}.conv_branch2b2")
    inputs["bn7"] = active(y, "bn7")
    return inputs


def test_stages_are_the_activated_inputs_of_b5_and_b6_and_the_activated_output(network: ResNet38d) -> None:
    x_NCHW = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        stages = network(x_NCHW)
        expected = by_table(network.state_dict(), x_NCHW)
    for actual, name in zip(stages, ("b5", "b6", "bn7"), strict=True):
        assert float(expected[name].std()) > 0.1
        difference = (actual - expected[name]).abs().max() / expected[name].abs().max()
        assert float(difference) < 1e-5


def test_batch_norms_keep_their_statistics_in_training(network: ResNet38d) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items() if ".running_" in name}
    network.train()
    try:
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 2 * 15 + 3 * 2 + 1
        assert not any(norm.training for norm in norms)
        assert network.b6.dropout_2b1.training
        with torch.no_grad():
            network(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)))
    finally:
        network.eval()
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not network.b6.dropout_2b1.training


def test_a_new_network_is_in_training_mode_except_its_batch_norms(skeleton: ResNet38d) -> None:
    assert skeleton.training
    assert not any(module.training for module in skeleton.modules() if isinstance(module, nn.BatchNorm2d))


def test_first_convolution_second_stage_and_batch_norms_are_frozen(skeleton: ResNet38d) -> None:
    trained = {name for name, parameter in skeleton.named_parameters() if parameter.requires_grad}
    kernels = {name for name in published_shapes() if ".conv_" in name}
    assert trained == {name for name in kernels if name.split(".")[0] not in ("b2", "b2_1", "b2_2")}


def test_the_dropout_is_that_of_the_paper(skeleton: ResNet38d) -> None:
    assert [skeleton.b6.dropout_2b1.p, skeleton.b6.dropout_2b2.p] == [0.3, 0.3]
    assert [skeleton.b7.dropout_2b1.p, skeleton.b7.dropout_2b2.p] == [0.5, 0.5]
