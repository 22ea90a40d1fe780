from __future__ import annotations

import pytest
import torch

from models.cam import LayerMaps, cam, grad_cam_layers, pseudo_masks
from models.classifier import Classifier


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(3)
    return Classifier("resnet18", "pda", 3).eval()


def test_deep_map_is_cam_over_the_number_of_cells(classifier: Classifier) -> None:
    x_NCHW = torch.rand(2, 3, 64, 64)
    stages = classifier.stages(x_NCHW)
    logits_NK = classifier.head(stages.deep)
    deep = grad_cam_layers(classifier, x_NCHW).deep
    assert torch.allclose(deep, cam(stages.deep, classifier.head.weight_KC).detach() / 64, atol=1e-6)
    for k in range(3):
        (gradient,) = torch.autograd.grad(logits_NK[:, k].sum(), stages.deep, retain_graph=True)
        by_gradient = (gradient.mean(dim=(2, 3), keepdim=True) * stages.deep).sum(dim=1)
        assert torch.allclose(deep[:, k], by_gradient, atol=1e-6)


def test_maps_agree_with_pytorch_grad_cam(classifier: Classifier) -> None:
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x_NCHW = torch.rand(2, 3, 64, 64)
    ours = grad_cam_layers(classifier, x_NCHW)
    layers = {
        "shallow": classifier.backbone.net.layer2,
        "middle": classifier.backbone.net.layer3,
        "deep": classifier.backbone.net.layer4,
    }
    for name, layer in layers.items():
        with grad_cam.GradCAM(model=classifier, target_layers=[layer]) as theirs:
            for k in range(3):
                theirs(input_tensor=x_NCHW, targets=[ClassifierOutputTarget(k)] * 2)
                activations = theirs.activations_and_grads.activations[0].numpy()
                gradients = theirs.activations_and_grads.gradients[0].numpy()
                expected = theirs.get_cam_image(x_NCHW, layer, None, activations, gradients, False)
                assert torch.allclose(getattr(ours, name)[:, k], torch.as_tensor(expected), atol=1e-6)


def test_maps_of_an_image_do_not_depend_on_its_batch(classifier: Classifier) -> None:
    x_NCHW = torch.rand(3, 3, 64, 64)
    together, alone = grad_cam_layers(classifier, x_NCHW), grad_cam_layers(classifier, x_NCHW[1:2])
    for whole, single in zip(together, alone, strict=True):
        assert torch.allclose(whole[1], single[0], atol=1e-5)


def test_frozen_weights_give_the_same_maps(classifier: Classifier) -> None:
    x_NCHW = torch.rand(1, 3, 64, 64)
    before = grad_cam_layers(classifier, x_NCHW)
    classifier.requires_grad_(False)
    after = grad_cam_layers(classifier, x_NCHW)
    classifier.requires_grad_(True)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_training_mode_is_refused(classifier: Classifier) -> None:
    classifier.train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            grad_cam_layers(classifier, torch.rand(1, 3, 64, 64))
    finally:
        classifier.eval()


def _same(map_NKhw: torch.Tensor) -> LayerMaps:
    return LayerMaps(map_NKhw, map_NKhw, map_NKhw)


def test_single_label_patch_is_solid_even_where_its_map_is_lowest() -> None:
    map_NKhw = torch.stack([torch.linspace(5, 9, 16).view(4, 4), torch.linspace(-3, 0, 16).view(4, 4)])[None]
    labels = pseudo_masks(_same(map_NKhw), torch.tensor([[False, True]]), (16, 16))
    assert labels.shape == (1, 3, 16, 16)
    assert (labels == 1).all()


def test_flat_map_never_falls_to_an_absent_class() -> None:
    labels = pseudo_masks(_same(torch.zeros(1, 3, 4, 4)), torch.tensor([[False, False, True]]), (8, 8))
    assert (labels == 2).all()


def test_mask_follows_the_higher_map() -> None:
    map_NKhw = torch.zeros(1, 2, 2, 2)
    map_NKhw[0, 0, :, 0] = 1.0
    map_NKhw[0, 1, :, 1] = 0.8
    labels = pseudo_masks(_same(map_NKhw), torch.tensor([[True, True]]), (2, 2))
    assert labels[0, 2].tolist() == [[0, 1], [0, 1]]


def test_patch_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one present class"):
        pseudo_masks(_same(torch.zeros(1, 2, 2, 2)), torch.tensor([[False, False]]), (4, 4))
