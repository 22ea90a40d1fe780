"""Compare every head with its definition, written as loops over float64 arrays.

Shape suffixes: N batch, C channels, K classes, H and W the image, h and w the space of the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.heads import (
    HEADS,
    AbnHead,
    AreaHead,
    GapHead,
    HeadOutput,
    LfiHead,
    PcamHead,
)
from tests.models.slow_heads import (
    SLOW,
    arrays,
)

NAMES = ("gap", "pcam", "lfi", "lfi-release", "abn", "area")
ATTENTION_MAPS = ("lfi", "lfi-release", "abn")
LINEAR = ("gap", "pcam", "area")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def features(images: int = 3, channels: int = 5, *, seed: int = 1) -> torch.Tensor:
    """Return feature maps of 4×6 cells as after a ReLU: about half of the values are 0."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.maximum(rng.normal(size=(images, channels, 4, 6)), 0).astype(np.float32))


def pictures(images: int = 3, *, seed: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(images, 3, 32, 48)).astype(np.float32))


def make_head(name: str, channels: int = 5, classes: int = 3) -> nn.Module:
    """Return a head with random weights, batch norms and statistics."""
    with seeded(7):
        head = HEADS[name](channels, classes)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
        for module in head.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return head.eval()


@pytest.mark.parametrize("name", NAMES)
def test_head_agrees_with_its_definition(name: str) -> None:
    head, deep_NChw, x_NCHW = make_head(name), features(), pictures()
    with torch.no_grad():
        output: HeadOutput = head(deep_NChw, x_NCHW)
    state = arrays(head)
    for n in range(len(deep_NChw)):
        logits_K, map_Khw, *auxiliary = SLOW[name](deep_NChw[n].double().numpy(), x_NCHW[n].double().numpy(), state)
        np.testing.assert_allclose(output.logits_NK[n], logits_K, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(output.map_NKhw[n], map_Khw, rtol=1e-4, atol=1e-5)
        assert len(output.auxiliary_NK) == len(auxiliary)
        for actual_NK, expected_K in zip(output.auxiliary_NK, auxiliary, strict=True):
            np.testing.assert_allclose(actual_NK[n], expected_K, rtol=1e-4, atol=1e-5)


def test_the_registry_holds_these_heads_and_their_properties() -> None:
    assert set(HEADS) == set(NAMES)
    linear = {name for name in NAMES if make_head(name).linear_map}
    assert linear == set(LINEAR)
    assert {name for name in NAMES if make_head(name).averaged} == {"gap"}
    assert {name for name in NAMES if make_head(name).class_scores} == {"gap", "area"}


@pytest.mark.parametrize("name", ["gap", "area"])
def test_the_logits_of_a_part_follow_from_its_part_of_the_class_scores(name: str) -> None:
    head: Any = make_head(name)
    deep_NChw = features()
    with torch.no_grad():
        map_NKhw = head(deep_NChw, None).map_NKhw
        for part in (slice(None), slice(1, 3)):
            expected_NK = head(deep_NChw[:, :, part, part], None).logits_NK
            torch.testing.assert_close(head.pooled(map_NKhw[:, :, part, part]), expected_NK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [1, 4, 8])
def test_a_run_pools_to_the_same_bits_as_training(side: int) -> None:
    """A run reads thousands of windows and sorts their cells in another way."""
    head = AreaHead(8, 7).eval()
    map_NKhw = 3 * torch.randn((50, 7, side, side), generator=torch.Generator().manual_seed(side))
    map_NKhw[:10] = map_NKhw[:10].round()  # equal values
    with torch.inference_mode():
        found_NK = head.pooled(map_NKhw)
    assert torch.equal(found_NK, head.pooled(map_NKhw))


def test_logits_of_an_averaged_head_are_the_class_weights_times_the_mean_features() -> None:
    head, deep_NChw = make_head("gap"), features()
    with torch.no_grad():
        expected_NK = torch.einsum("nchw,kc->nk", deep_NChw, head.weight_KC) / 24
        assert torch.allclose(head(deep_NChw, pictures()).logits_NK, expected_NK, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_weights_of_a_linear_head_give_its_class_scores_up_to_a_bias(name: str) -> None:
    head, deep_NChw = make_head(name), features()
    with torch.no_grad():
        map_NKhw = head(deep_NChw, pictures()).map_NKhw
        scores_NKhw = torch.logit(map_NKhw) if name == "pcam" else map_NKhw
        cam_NKhw = torch.einsum("nchw,kc->nkhw", deep_NChw, head.weight_KC)
    bias_NKhw = scores_NKhw - cam_NKhw
    assert torch.allclose(bias_NKhw, bias_NKhw[:1, :, :1, :1].expand_as(bias_NKhw), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    head, deep_NChw, x_NCHW = make_head(name), features(), pictures()
    with torch.no_grad():
        together, alone = head(deep_NChw, x_NCHW), head(deep_NChw[1:2], x_NCHW[1:2])
    maps = 1 if name in ATTENTION_MAPS else 3
    assert alone.logits_NK.shape == (1, 3)
    assert alone.map_NKhw.shape == (1, maps, 4, 6)
    assert torch.allclose(alone.logits_NK[0], together.logits_NK[1], atol=1e-5)
    assert torch.allclose(alone.map_NKhw[0], together.map_NKhw[1], atol=1e-5)


def losses(output: HeadOutput) -> torch.Tensor:
    target_NK = torch.arange(output.logits_NK.numel()).reshape(output.logits_NK.shape).remainder(2).float()
    terms = [F.multilabel_soft_margin_loss(y_NK.float(), target_NK) for y_NK in (output[0], *output.auxiliary_NK)]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_a_finite_gradient_that_is_not_zero(name: str) -> None:
    with seeded(5):
        head = HEADS[name](8, 3).train()
        deep_NChw = features(4, 8).requires_grad_()
        losses(head(deep_NChw, pictures(4))).backward()
    for parameter_name, parameter in [("deep", deep_NChw), *head.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        assert bool(parameter.grad.abs().max() > 1e-9), parameter_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [1, 3])
def test_a_training_step_under_bfloat16_is_finite(name: str, images: int) -> None:
    with seeded(6):
        head = HEADS[name](8, 3).train()
        deep_NChw = features(images, 8).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = head(deep_NChw, pictures(images))
        losses(output).backward()
    assert bool(output.logits_NK.isfinite().all())
    assert bool(output.map_NKhw.isfinite().all())
    for parameter in (deep_NChw, *head.parameters()):
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_near_those_of_float32(name: str) -> None:
    with seeded(8):
        head = HEADS[name](8, 3).eval()
    deep_NChw, x_NCHW = features(3, 8), pictures()
    with torch.no_grad():
        exact = head(deep_NChw, x_NCHW)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = head(deep_NChw.bfloat16(), x_NCHW)
    assert torch.allclose(reduced.logits_NK.float(), exact.logits_NK, atol=0.03)
    assert torch.allclose(reduced.map_NKhw.float(), exact.map_NKhw, atol=0.05)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_flat_features_give_finite_maps(name: str, value: float) -> None:
    with torch.no_grad():
        output = make_head(name)(torch.full((1, 5, 4, 6), value), torch.zeros(1, 3, 32, 48))
    assert bool(output.logits_NK.isfinite().all())
    assert bool(output.map_NKhw.isfinite().all())
    if name.startswith("lfi"):
        assert bool((output.map_NKhw == 0).all())


def test_the_gap_head_drops_whole_channels() -> None:
    head = GapHead(64, 1).train()
    with seeded(1):
        kept_NChw = head.dropout(torch.ones(1, 64, 5, 5))
    per_channel = kept_NChw[0].flatten(1)
    assert bool((per_channel == per_channel[:, :1]).all())
    assert set(per_channel[:, 0].tolist()) == {0.0, 2.0}


def test_parameter_names_are_those_of_shipped_bundles() -> None:
    assert set(GapHead(4, 2).state_dict()) == {"conv.weight"}


def area_of(scores_Khw: torch.Tensor) -> torch.Tensor:
    """Return the logits of an area head whose features are the scores."""
    classes = len(scores_Khw)
    head = AreaHead(classes, classes).eval()
    with torch.no_grad():
        head.conv.weight.copy_(torch.eye(classes)[:, :, None, None])
        logits_K: torch.Tensor = head(scores_Khw[None], torch.zeros(1, 3, 8, 8)).logits_NK[0]
    return logits_K


def test_area_is_the_mean_over_a_fifth_of_the_cells() -> None:
    scores_Khw = torch.zeros(2, 5, 20)
    scores_Khw[0] = 20.0
    for cells in range(20):
        covered = scores_Khw.clone()
        covered[:, 0, :cells] = torch.tensor([0.0, 20.0])[:, None]
        # The 20 best of the 100 cells count, so their mean is 0.5 if the class covers ten.
        expected = math.log(cells / (20 - cells)) if 0 < cells < 20 else math.log((1 - 1e-6) / 1e-6)
        actual = float(area_of(covered)[1])
        assert actual == pytest.approx(expected if cells else -expected, abs=0.05)


def test_area_is_bounded_if_a_class_is_certain() -> None:
    scores_Khw = torch.zeros(2, 4, 4)
    scores_Khw[0] = 1000.0
    bound = math.log((1 - 1e-6) / 1e-6)
    assert area_of(scores_Khw).tolist() == pytest.approx([bound, -bound], abs=0.05)


def test_area_averages_at_least_one_cell() -> None:
    scores_Khw = torch.zeros(2, 1, 3)
    scores_Khw[1, 0, 2] = 3.0
    assert area_of(scores_Khw).tolist() == pytest.approx([0.0, 3.0], abs=1e-5)


def test_the_inner_convolutions_of_the_importance_network_have_at_most_256_channels() -> None:
    shapes = [module.weight.shape[:2] for module in LfiHead(300, 2).importance if isinstance(module, nn.Conv2d)]
    assert [tuple(shape) for shape in shapes] == [(256, 300), (256, 256), (256, 256), (300, 256)]


def test_the_importance_network_of_the_authors_has_full_width_and_ends_with_a_relu() -> None:
    importance = HEADS["lfi-release"](300, 2).importance
    assert isinstance(importance, nn.Sequential)
    shapes = [module.weight.shape[:2] for module in importance if isinstance(module, nn.Conv2d)]
    assert [tuple(shape) for shape in shapes] == [(300, 300)] * 4
    assert isinstance(importance[-1], nn.ReLU)
    assert isinstance(LfiHead(300, 2).importance[-1], nn.BatchNorm2d)


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_attention_of_lfi_spans_zero_to_one_in_each_image_also_for_faint_features(strength: float) -> None:
    with torch.no_grad():
        map_N1hw = make_head("lfi")(strength * features(), pictures()).map_NKhw
    assert map_N1hw.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert map_N1hw.amax(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1])


def test_branches_of_abn_share_no_weights() -> None:
    head = AbnHead(8, 2)
    deep_NChw, x_NCHW = features(2, 8), pictures(2)
    head(deep_NChw, x_NCHW).auxiliary_NK[0].sum().backward()
    touched = {name.split(".")[0] for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert touched == {"attention_stage", "class_maps", "attention_logits"}


def test_pcam_pools_over_the_heatmap_of_the_class() -> None:
    """A small bright lesion decides the logit; average pooling would dilute it."""
    head = PcamHead(1, 1).eval()
    with torch.no_grad():
        head.conv.weight.fill_(1.0)
        assert head.conv.bias is not None
        head.conv.bias.fill_(-10.0)
        deep_NChw = torch.zeros(1, 1, 4, 4)
        deep_NChw[0, 0, 1, 2] = 20.0
        output = head(deep_NChw, torch.zeros(1, 3, 8, 8))
    assert float(output.logits_NK) == pytest.approx(10.0, abs=0.05)
    assert float(output.map_NKhw[0, 0, 1, 2]) == pytest.approx(1.0, abs=1e-4)
