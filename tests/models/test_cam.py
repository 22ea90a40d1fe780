"""Class activation maps are those of public libraries and of the formulas, for every head, layer, chunk and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.backbone import Stages
from models.cam import (
    CAMS,
    LAYERS,
    cam_maps,
    layer_maps,
    weighted_features,
)
from models.classifier import Classifier
from models.errors import CamUnavailableError
from models.heads import HeadOutput
from tests.cases import full
from tests.models.cam_comparison import CLASSES, assert_close, module, their_map


@pytest.fixture(scope="module")
def steep(classifier: Classifier) -> Classifier:
    """Return a classifier with such large gradients that the constants others add to their squares do not matter."""
    scaled = copy.deepcopy(classifier)
    scaled.head.conv.weight.data.mul_(1e5)
    return scaled


def test_cam_sums_features_with_the_weights_of_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    deep_NChw, weight_KC = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(3, 4, generator=generator)
    maps = weighted_features(deep_NChw, weight_KC)
    for n, k, y, x in np.ndindex(2, 3, 3, 5):
        expected = sum(float(weight_KC[k, c]) * float(deep_NChw[n, c, y, x]) for c in range(4))
        assert float(maps[n, k, y, x]) == pytest.approx(expected, abs=1e-5)


def test_cam_agrees_with_torch_cam(classifier: Classifier, x_NCHW: Tensor) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    ours = cam_maps("cam", classifier, x_NCHW)
    with methods.CAM(classifier, module(classifier, "deep"), "head.conv") as theirs:
        classifier(x_NCHW)
        for k in range(CLASSES):
            assert_close(ours[:, k], theirs(k, normalized=False)[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_agrees_with_torch_cam_after_a_relu(classifier: Classifier, x_NCHW: Tensor, layer: str) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    ours = cam_maps("grad-cam", classifier, x_NCHW, layer)
    with methods.GradCAM(classifier, module(classifier, layer)) as theirs:
        expected = [theirs(k, classifier(x_NCHW), normalized=False)[0] for k in range(CLASSES)]
    assert_close(ours.relu(), torch.stack(expected, dim=1))


@pytest.mark.parametrize("layer", [full("shallow"), "middle", full("deep")])
@pytest.mark.parametrize("method", ["grad-cam", "grad-cam++"])
def test_gradient_maps_agree_with_pytorch_grad_cam(steep: Classifier, x_NCHW: Tensor, method: str, layer: str) -> None:
    """Their `get_cam_image` precedes their ReLU, min-max and resizing; our Grad-CAM++ includes the ReLU."""
    library = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    ours = cam_maps(method, steep, x_NCHW, layer)
    kind = {"grad-cam": library.GradCAM, "grad-cam++": library.GradCAMPlusPlus}[method]
    with kind(model=steep, target_layers=[module(steep, layer)]) as theirs:
        for k in range(CLASSES):
            expected = torch.as_tensor(their_map(theirs, x_NCHW, module(steep, layer), k))
            assert_close(ours[:, k], expected if method == "grad-cam" else expected.relu())


def test_grad_cam_plus_plus_of_torch_cam_is_ours_without_the_denominator(steep: Classifier, x_NCHW: Tensor) -> None:
    """torch-cam 0.5.0 divides a masked copy of alpha and uses the undivided one: its weights are ``sum g² relu(g)``.

    With its alphas multiplied by the paper's (at the deep stage g is w / 64 everywhere) they would be ours.
    """
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    deep_NChw = steep.stages(x_NCHW).deep.detach()
    total_NC = deep_NChw.sum(dim=(2, 3))
    with methods.GradCAMpp(steep, module(steep, "deep")) as theirs:
        for k in range(CLASSES):
            g_C = steep.head.weight_KC[k].detach() / 64
            undivided_C = 64 * g_C.square() * g_C.relu()
            map_Nhw = theirs(k, steep(x_NCHW), normalized=False)[0]
            assert_close(map_Nhw, torch.einsum("c,nchw->nhw", undivided_C, deep_NChw).relu())
            weight_NC = undivided_C / (2 * g_C**2 + total_NC * g_C**3).where(g_C > 0, torch.ones(()))
            ours_Nhw = cam_maps("grad-cam++", steep, x_NCHW)[:, k]
            assert_close(ours_Nhw, torch.einsum("nc,nchw->nhw", weight_NC, deep_NChw))


def test_grad_cam_plus_plus_equals_the_formula_of_the_paper(classifier: Classifier, x_NCHW: Tensor) -> None:
    ours = cam_maps("grad-cam++", classifier, x_NCHW, "middle")
    stages = classifier.stages(x_NCHW.clone().requires_grad_())
    logits_NK = classifier.head_output(stages, x_NCHW).logits_NK
    for k in range(CLASSES):
        (gradient,) = torch.autograd.grad(logits_NK[:, k].sum(), stages.middle, retain_graph=True)
        for n in range(len(x_NCHW)):
            expected = np.zeros(stages.middle.shape[2:])
            for a, g in zip(stages.middle[n].detach().double().numpy(), gradient[n].double().numpy(), strict=True):
                denominator = 2 * g**2 + a.sum() * g**3
                alpha = np.divide(g**2, denominator, out=np.zeros_like(g), where=g != 0)
                expected += (alpha * np.maximum(g, 0)).sum() * a
            assert_close(ours[n, k], np.maximum(expected, 0).astype(np.float32))


def test_grad_cam_plus_plus_keeps_gradients_whose_square_is_far_below_a_published_constant() -> None:
    """With gradients of 1e-5, the 1e-6 that others add to the denominator would make both weights nearly 0, and their
    ratio 8 instead of 2.
    """
    tiny: Any = FakeClassifier(torch.tensor([[1e-5, 2e-5]]))
    deep_NChw = tiny.stages(torch.rand(1, 3, 4, 4)).deep
    (maps_Khw,) = cam_maps("grad-cam++", tiny, torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(maps_Khw[0], 0.5e-5 * deep_NChw[0, 0] + 1e-5 * deep_NChw[0, 1], rtol=1e-3, atol=0.0)


def test_grad_cam_plus_plus_counts_positive_features_in_its_denominator() -> None:
    """Equation 19 itself has a pole if the sum of the features times the gradient is -2."""
    mixed: Any = FakeClassifier(torch.tensor([[2.0, 2.0]]), low=-0.5)
    x_NCHW = torch.rand(1, 3, 4, 4)
    # Half the pixels of each channel are positive, 1/6 and 1/2: their sum is 8/3. The gradient is 1/8 everywhere.
    summed_11hw = mixed.stages(x_NCHW).deep.sum(dim=1, keepdim=True)
    expected = (16 * (1 / 8) / (2 + 8 / 3 / 8) * summed_11hw).relu()
    torch.testing.assert_close(cam_maps("grad-cam++", mixed, x_NCHW), expected)


class FakeClassifier(nn.Module):
    """Two fixed channels, a ramp along x and one along y from `low` to `low` + 1, and linear weights of their means."""

    def __init__(self, weight_KC: Tensor, low: float = 0.0) -> None:
        super().__init__()
        self.low = low
        self.weight_KC = weight_KC
        self.head = SimpleNamespace(averaged=False)
        self.eval()

    def stages(self, x_NCHW: Tensor) -> Stages:
        ramp = torch.linspace(self.low, self.low + 1, 4)
        deep_NChw = torch.stack([ramp.expand(4, 4), ramp[:, None].expand(4, 4)])[None].repeat(len(x_NCHW), 1, 1, 1)
        return Stages(deep_NChw, deep_NChw, deep_NChw.clone())

    def head_output(self, stages: Stages, x_NCHW: Tensor) -> HeadOutput:
        logits_NK = stages.deep.mean(dim=(2, 3)) @ self.weight_KC.T
        return HeadOutput(logits_NK, weighted_features(stages.deep, self.weight_KC))


@pytest.mark.parametrize("head", ["gap", full("pcam"), "area", full("lfi"), full("abn")])
def test_grad_cam_of_every_head_is_the_mean_gradient_times_the_features(
    classifiers: Callable[[str], Classifier], x_NCHW: Tensor, head: str
) -> None:
    classifier = classifiers(head)
    maps = layer_maps("grad-cam", classifier, x_NCHW)
    stages = classifier.stages(x_NCHW.clone().requires_grad_())
    logits_NK = classifier.head_output(stages, x_NCHW).logits_NK
    for layer, map_NKhw in zip(LAYERS, maps, strict=True):
        activation_NChw = getattr(stages, layer)
        for k in range(CLASSES):
            (gradient,) = torch.autograd.grad(logits_NK[:, k].sum(), activation_NChw, retain_graph=True)
            expected = (gradient.mean(dim=(2, 3), keepdim=True) * activation_NChw).sum(dim=1)
            assert_close(map_NKhw[:, k], expected.detach())
        assert torch.allclose(cam_maps("grad-cam", classifier, x_NCHW, layer), map_NKhw, rtol=1e-4, atol=1e-6)


def test_deep_grad_cam_of_pooled_heads_is_cam_over_the_number_of_cells(classifier: Classifier, x_NCHW: Tensor) -> None:
    assert_close(cam_maps("grad-cam", classifier, x_NCHW), cam_maps("cam", classifier, x_NCHW) / 64)


def test_deep_maps_of_pooled_heads_need_no_backward_pass(
    classifier: Classifier, x_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    for method in ("cam", "grad-cam", "grad-cam++", "score-cam"):
        assert cam_maps(method, classifier, x_NCHW[:1, :, :32, :32]).shape == (1, CLASSES, 4, 4)
    with pytest.raises(AssertionError, match="a backward pass"):
        cam_maps("grad-cam", classifier, x_NCHW, "middle")


def test_one_backward_pass_per_class_serves_the_whole_batch_and_all_layers(
    classifier: Classifier, x_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    derive = torch.autograd.grad

    def counting(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        nonlocal passes
        passes += 1
        found: tuple[Tensor, ...] = derive(*args, **options)
        return found

    monkeypatch.setattr(torch.autograd, "grad", counting)
    layer_maps("grad-cam", classifier, x_NCHW)
    assert passes == CLASSES


HEAD_OF = {"cam": "gap", "grad-cam": "lfi", "grad-cam++": "pcam", "lfi-cam": "lfi", "pcam": "pcam", "abn": "abn"}


@pytest.mark.parametrize(
    "method", ["cam", "grad-cam++", *(full(name) for name in ("grad-cam", "lfi-cam", "pcam", "abn"))]
)
def test_maps_depend_neither_on_the_chunk_nor_on_the_batch(
    classifiers: Callable[[str], Classifier], method: str
) -> None:
    classifier = classifiers(HEAD_OF[method])
    x_NCHW = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    together = layer_maps(method, classifier, x_NCHW)
    in_parts = layer_maps(method, classifier, x_NCHW, chunk=2)
    alone = layer_maps(method, classifier, x_NCHW[1:2])
    for whole, part, single in zip(together, in_parts, alone, strict=True):
        assert whole.dtype == torch.float32
        assert not whole.requires_grad
        assert_close(part, whole)
        assert_close(single[0], whole[1])


@pytest.mark.parametrize("method", HEAD_OF)
def test_at_most_a_chunk_of_images_passes_at_once(
    classifiers: Callable[[str], Classifier], small_NCHW: Tensor, method: str
) -> None:
    classifier = classifiers(HEAD_OF[method])
    batches: list[int] = []
    hook = classifier.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    cam_maps(method, classifier, small_NCHW.repeat(3, 1, 1, 1)[:5], chunk=2)
    hook.remove()
    assert set(batches) == {1, 2}


def test_frozen_weights_give_the_same_maps(classifier: Classifier, x_NCHW: Tensor) -> None:
    before = layer_maps("grad-cam", classifier, x_NCHW)
    classifier.requires_grad_(False)
    after = layer_maps("grad-cam", classifier, x_NCHW)
    classifier.requires_grad_(True)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_pcam_is_the_sigmoid_of_the_head_scores(classifiers: Callable[[str], Classifier], x_NCHW: Tensor) -> None:
    classifier = classifiers("pcam")
    deep_NChw = classifier.stages(x_NCHW).deep.detach()
    assert_close(cam_maps("pcam", classifier, x_NCHW), classifier.head.conv(deep_NChw).detach().sigmoid())


@pytest.mark.parametrize("method", ["lfi-cam", "abn"])
def test_attention_of_all_classes_is_multiplied_with_each_class_map(
    classifiers: Callable[[str], Classifier], x_NCHW: Tensor, method: str
) -> None:
    classifier = classifiers(HEAD_OF[method])
    with torch.no_grad():
        attention_N1hw = classifier.head_output(classifier.stages(x_NCHW), x_NCHW).map_NKhw
    assert attention_N1hw.shape == (2, 1, 8, 8)
    assert attention_N1hw.amin() >= 0
    assert attention_N1hw.amax() <= 1
    assert attention_N1hw.std() > 0
    maps = cam_maps(method, classifier, x_NCHW)
    class_maps = cam_maps("grad-cam", classifier, x_NCHW)
    for k in range(CLASSES):
        assert_close(maps[:, k], attention_N1hw[:, 0] * class_maps[:, k])


@pytest.mark.parametrize("method", ["cam", full("pcam"), full("lfi-cam"), full("abn")])
def test_methods_of_the_deep_layer_use_grad_cam_at_the_other_layers(
    classifiers: Callable[[str], Classifier], x_NCHW: Tensor, method: str
) -> None:
    classifier = classifiers(HEAD_OF[method])
    maps, by_gradient = layer_maps(method, classifier, x_NCHW), layer_maps("grad-cam", classifier, x_NCHW)
    assert_close(maps.shallow, by_gradient.shallow)
    assert_close(maps.middle, by_gradient.middle)
    assert_close(maps.deep, cam_maps(method, classifier, x_NCHW))


@pytest.mark.parametrize("method", ["grad-cam++", full("score-cam")])
def test_layer_maps_are_the_maps_of_each_layer(classifier: Classifier, small_NCHW: Tensor, method: str) -> None:
    x_1CHW = small_NCHW[:1]
    for layer, map_1Khw in zip(LAYERS, layer_maps(method, classifier, x_1CHW), strict=True):
        assert_close(map_1Khw, cam_maps(method, classifier, x_1CHW, layer))


@pytest.mark.parametrize(
    ("method", "head", "layer", "message"),
    [
        (
            "pcam",
            "gap",
            "deep",
            "was trained with head 'pcam', but this one has a GapHead; train one",
        ),
        ("lfi-cam", "gap", "deep", "lfi-cam needs a classifier that was trained with head 'lfi'"),
        ("abn", "lfi", "deep", "abn needs a classifier that was trained with head 'abn'"),
        ("cam", "lfi", "deep", "cam needs a head whose class map is linear"),
        ("cam", "gap", "middle", "cam is defined at the deep layer, not at the middle one; use grad-cam"),
        ("grad-cam", "gap", "top", "unknown layer 'top'; use one of shallow, middle, deep"),
        ("score-cam", "gap", "top", "unknown layer 'top'"),
        ("eigen-cam", "gap", "deep", "unknown CAM method 'eigen-cam'; use one of " + ", ".join(CAMS)),
    ],
)
def test_a_method_that_does_not_work_with_the_classifier_is_refused(
    classifiers: Callable[[str], Classifier], x_NCHW: Tensor, method: str, head: str, layer: str, message: str
) -> None:
    with pytest.raises(CamUnavailableError, match=message.replace("+", r"\+")):
        cam_maps(method, classifiers(head), x_NCHW, layer)


@pytest.mark.parametrize("method", ["cam", "grad-cam", "grad-cam++", "score-cam"])
def test_training_mode_is_refused(classifier: Classifier, x_NCHW: Tensor, method: str) -> None:
    classifier.train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            cam_maps(method, classifier, x_NCHW)
    finally:
        classifier.eval()
