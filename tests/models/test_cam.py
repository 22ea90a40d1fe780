from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbone import Stages
from models.cam import (
    CAM_METHODS,
    LAYERS,
    abn,
    cam,
    cam_maps,
    grad_cam,
    grad_cam_plus_plus,
    layer_maps,
    lfi_cam,
    pcam,
)
from models.classifier import Classifier
from models.errors import CamUnavailableError
from models.heads import HeadOutput
from models.score_cam import ScoreCamVariant, score_cam

CLASSES = 3


@pytest.fixture(scope="module")
def classifiers() -> Callable[[str], Classifier]:
    """Random classifiers by head."""
    made: dict[str, Classifier] = {}

    def make(head: str) -> Classifier:
        if head not in made:
            torch.manual_seed(3)
            made[head] = Classifier("resnet18", head, CLASSES).eval()
        return made[head]

    return make


@pytest.fixture(scope="module")
def classifier(classifiers: Callable[[str], Classifier]) -> Classifier:
    return classifiers("gap")


@pytest.fixture(scope="module")
def x_NCHW() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def small_NCHW() -> Tensor:
    """For Score-CAM, which passes each of 128 channels of each image."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def steep(classifier: Classifier) -> Classifier:
    """Gradients so large that the constants which others add to their squares do not matter."""
    scaled = copy.deepcopy(classifier)
    scaled.head.conv.weight.data.mul_(1e5)
    return scaled


def module(classifier: Classifier, layer: str) -> nn.Module:
    """The stage as torch-cam and pytorch-grad-cam want it."""
    net = classifier.backbone.net
    modules: dict[str, nn.Module] = {"shallow": net.layer2, "middle": net.layer3, "deep": net.layer4}
    return modules[layer]


def assert_close(ours: Tensor, expected: Tensor | NDArray[np.float32]) -> None:
    """Equal to 1e-4 of the value, or of the map's largest one where terms cancel."""
    wanted = torch.as_tensor(expected)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_cam_sums_features_with_the_weights_of_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    deep_NChw, weight_KC = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(3, 4, generator=generator)
    maps = cam(deep_NChw, weight_KC)
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
def test_grad_cam_agrees_with_torch_cam_after_the_relu_that_ours_leaves_out(
    classifier: Classifier, x_NCHW: Tensor, layer: str
) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    ours = cam_maps("grad-cam", classifier, x_NCHW, layer)
    with methods.GradCAM(classifier, module(classifier, layer)) as theirs:
        expected = [theirs(k, classifier(x_NCHW), normalized=False)[0] for k in range(CLASSES)]
    assert_close(ours.relu(), torch.stack(expected, dim=1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["grad-cam", "grad-cam++"])
def test_gradient_maps_agree_with_pytorch_grad_cam(steep: Classifier, x_NCHW: Tensor, method: str, layer: str) -> None:
    """Their `get_cam_image` comes before their ReLU, min-max and resizing; ours of Grad-CAM++ after the ReLU."""
    library = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    ours = cam_maps(method, steep, x_NCHW, layer)
    kind = {"grad-cam": library.GradCAM, "grad-cam++": library.GradCAMPlusPlus}[method]
    with kind(model=steep, target_layers=[module(steep, layer)]) as theirs:
        for k in range(CLASSES):
            expected = torch.as_tensor(their_map(theirs, x_NCHW, module(steep, layer), k))
            assert_close(ours[:, k], expected if method == "grad-cam" else expected.relu())


def their_map(theirs: Any, x_NCHW: Tensor, layer: nn.Module, k: int) -> NDArray[np.float32]:
    """What pytorch-grad-cam makes of class k, before its ReLU, min-max and resizing."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(k)] * len(x_NCHW)
    logits_NK = theirs.activations_and_grads(x_NCHW)
    if theirs.uses_gradients:
        sum(target(logit_K) for target, logit_K in zip(targets, logits_NK, strict=True)).backward()
    gradients = [gradient.numpy() for gradient in theirs.activations_and_grads.gradients] or [None]
    activations = theirs.activations_and_grads.activations[0].detach().numpy()
    image: NDArray[np.float32] = theirs.get_cam_image(x_NCHW, layer, targets, activations, gradients[0], False)
    return image


def test_torch_cams_grad_cam_plus_plus_is_ours_without_the_denominator(steep: Classifier, x_NCHW: Tensor) -> None:
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
            ours_Nhw = grad_cam_plus_plus(steep, x_NCHW)[:, k]
            assert_close(ours_Nhw, torch.einsum("nc,nchw->nhw", weight_NC, deep_NChw))


def test_grad_cam_plus_plus_is_the_papers_formula_in_double_precision(classifier: Classifier, x_NCHW: Tensor) -> None:
    ours = grad_cam_plus_plus(classifier, x_NCHW, "middle")
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


def test_grad_cam_plus_plus_keeps_gradients_whose_square_is_nothing_beside_a_published_constant() -> None:
    """Gradients of 1e-5: others' 1e-6 in the denominator would make the weights of both channels all but 0, and their
    ratio 8 instead of 2.
    """
    tiny: Any = FakeClassifier(torch.tensor([[1e-5, 2e-5]]))
    deep_NChw = tiny.stages(torch.rand(1, 3, 4, 4)).deep
    (maps_Khw,) = grad_cam_plus_plus(tiny, torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(maps_Khw[0], 0.5e-5 * deep_NChw[0, 0] + 1e-5 * deep_NChw[0, 1], rtol=1e-3, atol=0.0)


def test_grad_cam_plus_plus_counts_positive_features_in_its_denominator() -> None:
    """Equation 19 as it stands has a pole where the features' sum times the gradient is -2."""
    mixed: Any = FakeClassifier(torch.tensor([[2.0, 2.0]]), low=-0.5)
    x_NCHW = torch.rand(1, 3, 4, 4)
    # Of each channel half the pixels are positive, 1/6 and 1/2: the sum is 8/3. The gradient is 1/8 everywhere.
    summed_11hw = mixed.stages(x_NCHW).deep.sum(dim=1, keepdim=True)
    expected = (16 * (1 / 8) / (2 + 8 / 3 / 8) * summed_11hw).relu()
    torch.testing.assert_close(grad_cam_plus_plus(mixed, x_NCHW), expected)


class FakeClassifier(nn.Module):
    """Two fixed channels (a ramp along x, one along y, from `low` to `low` + 1), and linear weights over their mean."""

    def __init__(self, weight_KC: Tensor, low: float = 0.0) -> None:
        super().__init__()
        self.low = low
        self.weight_KC = weight_KC
        self.head = nn.Identity()
        self.eval()

    def stages(self, x_NCHW: Tensor) -> Stages:
        ramp = torch.linspace(self.low, self.low + 1, 4)
        deep_NChw = torch.stack([ramp.expand(4, 4), ramp[:, None].expand(4, 4)])[None].repeat(len(x_NCHW), 1, 1, 1)
        return Stages(deep_NChw, deep_NChw, deep_NChw.clone())

    def head_output(self, stages: Stages, x_NCHW: Tensor) -> HeadOutput:
        logits_NK = stages.deep.mean(dim=(2, 3)) @ self.weight_KC.T
        return HeadOutput(logits_NK, cam(stages.deep, self.weight_KC))


@pytest.mark.parametrize("variant", ["torch-cam", "pytorch-grad-cam"])
def test_score_cam_variants_agree_with_the_libraries_they_are_named_after(
    classifier: Classifier, small_NCHW: Tensor, variant: ScoreCamVariant
) -> None:
    """torch-cam with its ReLU, pytorch-grad-cam before its own, which the features being positive makes the same."""
    ours = score_cam(classifier, small_NCHW, "shallow", variant=variant, chunk=50)
    layer = module(classifier, "shallow")
    if variant == "torch-cam":
        methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
        with methods.ScoreCAM(classifier, layer, batch_size=64) as theirs, torch.no_grad():
            for k in range(CLASSES):
                classifier(small_NCHW)
                assert_close(ours[:, k], theirs(k, normalized=False)[0])
    else:
        library = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
        with library.ScoreCAM(model=classifier, target_layers=[layer]) as theirs:
            for k in range(CLASSES):
                assert_close(ours[:, k], their_map(theirs, small_NCHW, layer, k))


def official_score_cam(classifier: Classifier, x_1CHW: Tensor, activation_1Chw: Tensor) -> Tensor:
    """The loop of the release (softmax over the classes, constant channels skipped), up to its final min-max; of all
    classes at once, (1, K, H, W), because a channel's scores come from one pass.
    """
    size_HW = (x_1CHW.shape[2], x_1CHW.shape[3])
    total_1KHW = torch.zeros(1, CLASSES, *size_HW)
    for channel_1hw in activation_1Chw.detach()[0][:, None]:
        up = F.interpolate(channel_1hw[None], size_HW, mode="bilinear", align_corners=False)
        if up.max() == up.min():
            continue
        with torch.no_grad():
            scores_1K = classifier(x_1CHW * (up - up.min()) / (up.max() - up.min())).softmax(dim=1)
        total_1KHW += scores_1K[:, :, None, None] * up
    return total_1KHW.relu()


def test_official_score_cam_is_the_releases_loop(classifiers: Callable[[str], Classifier], small_NCHW: Tensor) -> None:
    classifier = classifiers("pda")
    ours = score_cam(classifier, small_NCHW, "shallow")
    up = F.interpolate(ours, (32, 32), mode="bilinear", align_corners=False)
    for n in range(2):
        x_1CHW = small_NCHW[n : n + 1]
        assert_close(up[n : n + 1], official_score_cam(classifier, x_1CHW, classifier.stages(x_1CHW).shallow))


@pytest.mark.parametrize("variant", ["official", "torch-cam", "pytorch-grad-cam"])
def test_score_cam_does_not_depend_on_its_chunks_nor_an_image_on_its_batch(
    classifier: Classifier, small_NCHW: Tensor, variant: ScoreCamVariant
) -> None:
    together = score_cam(classifier, small_NCHW, "shallow", variant=variant, chunk=256)
    assert_close(score_cam(classifier, small_NCHW, "shallow", variant=variant, chunk=7), together)
    assert_close(score_cam(classifier, small_NCHW[1:], "shallow", variant=variant)[0], together[1])


def test_score_cam_passes_at_most_a_chunk_of_images_at_once_and_skips_constant_channels(
    classifier: Classifier, small_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    counted = classifier.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    stages = classifier.stages

    def half_dead(x_NCHW: Tensor) -> Stages:
        found = stages(x_NCHW)
        return found._replace(shallow=torch.cat([found.shallow[:, :5], 0 * found.shallow[:, 5:] + 3.0], dim=1))

    monkeypatch.setattr(classifier, "stages", half_dead)
    maps = score_cam(classifier, small_NCHW, "shallow", chunk=3)
    counted.remove()
    assert max(batches) == 3
    first_NChw = stages(small_NCHW).shallow[:, :5]
    varied = int((first_NChw.amax(dim=(2, 3)) > first_NChw.amin(dim=(2, 3))).sum())
    assert varied > 3
    # The images, the blank one, and the channels that vary.
    assert sum(batches) == 2 + 1 + varied
    living = F.interpolate(maps[:1], (32, 32), mode="bilinear", align_corners=False)
    monkeypatch.undo()
    assert_close(living, official_score_cam(classifier, small_NCHW[:1], stages(small_NCHW[:1]).shallow[:, :5]))


def test_score_cam_of_flat_features_is_zero(
    classifier: Classifier, x_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = classifier.stages
    monkeypatch.setattr(classifier, "stages", lambda x: Stages(*(0 * stage + 2.0 for stage in stages(x))))
    maps = score_cam(classifier, x_NCHW)
    assert maps.shape == (2, CLASSES, 8, 8)
    assert (maps == 0).all()


def test_unknown_score_cam_is_refused(classifier: Classifier, x_NCHW: Tensor) -> None:
    variant: Any = "fourth"
    with pytest.raises(CamUnavailableError, match="known are official, torch-cam, pytorch-grad-cam"):
        score_cam(classifier, x_NCHW, variant=variant)


@pytest.mark.parametrize("head", ["gap", "pda", "pcam", "area", "lfi", "abn"])
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
        assert torch.allclose(grad_cam(classifier, x_NCHW, layer), map_NKhw, rtol=1e-4, atol=1e-6)


def test_deep_grad_cam_of_pooled_heads_is_cam_over_the_number_of_cells(classifier: Classifier, x_NCHW: Tensor) -> None:
    assert_close(grad_cam(classifier, x_NCHW), cam_maps("cam", classifier, x_NCHW) / 64)


def test_deep_maps_of_pooled_heads_need_no_backward_pass(
    classifier: Classifier, x_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    for method in ("cam", "grad-cam", "grad-cam++", "score-cam"):
        assert cam_maps(method, classifier, x_NCHW[:1, :, :32, :32]).shape == (1, CLASSES, 4, 4)
    with pytest.raises(AssertionError, match="a backward pass"):
        grad_cam(classifier, x_NCHW, "middle")


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


@pytest.mark.parametrize("method", HEAD_OF)
def test_layer_maps_do_not_depend_on_chunks_nor_an_image_on_its_batch(
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


def test_pcam_is_the_sigmoid_of_the_heads_scores(classifiers: Callable[[str], Classifier], x_NCHW: Tensor) -> None:
    classifier = classifiers("pcam")
    deep_NChw = classifier.stages(x_NCHW).deep.detach()
    maps = pcam(classifier, x_NCHW)
    assert_close(maps, classifier.head.conv(deep_NChw).detach().sigmoid())
    assert torch.equal(cam_maps("pcam", classifier, x_NCHW), maps)


@pytest.mark.parametrize(("method", "function"), [("lfi-cam", lfi_cam), ("abn", abn)])
def test_attention_of_all_classes_is_multiplied_with_each_class_map(
    classifiers: Callable[[str], Classifier],
    x_NCHW: Tensor,
    method: str,
    function: Callable[[Classifier, Tensor], Tensor],
) -> None:
    classifier = classifiers(HEAD_OF[method])
    attention_N1hw = function(classifier, x_NCHW)
    assert attention_N1hw.shape == (2, 1, 8, 8)
    assert attention_N1hw.amin() >= 0
    assert attention_N1hw.amax() <= 1
    assert attention_N1hw.std() > 0
    maps = cam_maps(method, classifier, x_NCHW)
    class_maps = grad_cam(classifier, x_NCHW)
    for k in range(CLASSES):
        assert_close(maps[:, k], attention_N1hw[:, 0] * class_maps[:, k])


@pytest.mark.parametrize("method", ["cam", "pcam", "lfi-cam", "abn"])
def test_methods_with_a_deep_map_only_take_grad_cam_at_the_others(
    classifiers: Callable[[str], Classifier], x_NCHW: Tensor, method: str
) -> None:
    classifier = classifiers(HEAD_OF[method])
    maps, by_gradient = layer_maps(method, classifier, x_NCHW), layer_maps("grad-cam", classifier, x_NCHW)
    assert_close(maps.shallow, by_gradient.shallow)
    assert_close(maps.middle, by_gradient.middle)
    assert_close(maps.deep, cam_maps(method, classifier, x_NCHW))


@pytest.mark.parametrize("method", ["grad-cam++", "score-cam"])
def test_layer_maps_are_the_maps_of_each_layer(classifier: Classifier, small_NCHW: Tensor, method: str) -> None:
    x_1CHW = small_NCHW[:1]
    for layer, map_1Khw in zip(LAYERS, layer_maps(method, classifier, x_1CHW), strict=True):
        assert_close(map_1Khw, cam_maps(method, classifier, x_1CHW, layer))


@pytest.mark.parametrize(
    ("method", "head", "layer", "message"),
    [
        ("pcam", "gap", "deep", "pcam needs a classifier trained with head 'pcam', this one has GapHead"),
        ("lfi-cam", "pda", "deep", "lfi-cam needs a classifier trained with head 'lfi'"),
        ("abn", "lfi", "deep", "abn needs a classifier trained with head 'abn'"),
        ("cam", "lfi", "deep", "cam needs a head whose class map is linear"),
        ("cam", "gap", "middle", "cam is defined at the deep layer, not at the middle one; use grad-cam"),
        ("grad-cam", "gap", "top", "unknown layer 'top'; known are shallow, middle, deep"),
        ("score-cam", "gap", "top", "unknown layer 'top'"),
        ("eigen-cam", "gap", "deep", "unknown CAM method 'eigen-cam'; known are " + ", ".join(CAM_METHODS)),
    ],
)
def test_maps_that_a_classifier_does_not_have_are_refused(
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
