from __future__ import annotations

import pytest
import torch

from models.classifier import Classifier
from models.errors import ArchitectureError
from models.heads import HEADS, progressive_dropout_attention


@pytest.fixture(scope="module")
def x_NCHW() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head", sorted(HEADS))
def test_the_classifier_returns_the_logits_of_its_head_on_the_deep_stage(head: str, x_NCHW: torch.Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = Classifier("resnet18", head, 3).eval()
    with torch.inference_mode():
        stages = classifier.stages(x_NCHW)
        output = classifier.head_output(stages, x_NCHW)
        expected = classifier.head(stages.deep, x_NCHW)
        logits_NK = classifier(x_NCHW)
    assert logits_NK.shape == (2, 3)
    assert torch.equal(logits_NK, expected.logits_NK)
    assert torch.equal(output.map_NKhw, expected.map_NKhw)
    assert tuple(output.map_NKhw.shape) == (2, 1 if head in ("lfi", "lfi-release", "abn") else 3, 8, 12)
    assert len(output.auxiliary_NK) == (1 if head == "abn" else 0)


def test_lfi_reads_the_image_besides_its_features(x_NCHW: torch.Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = Classifier("resnet18", "lfi", 3).eval()
    with torch.inference_mode():
        stages = classifier.stages(x_NCHW)
        bright = classifier.head_output(stages, x_NCHW + 100).map_NKhw
        assert not torch.allclose(bright, classifier.head_output(stages, x_NCHW).map_NKhw)


def test_all_three_stages_have_output_stride_8(x_NCHW: torch.Tensor) -> None:
    classifier = Classifier("tf_efficientnet_lite0", "gap", 2).eval()
    with torch.inference_mode():
        stages = classifier.stages(x_NCHW)
    assert [tuple(stage.shape) for stage in stages] == [(2, 40, 8, 12), (2, 112, 8, 12), (2, 1280, 8, 12)]
    assert classifier.head.conv.bias is None


@pytest.mark.parametrize(
    # TensorFlow's padding puts the centers of strided convolutions on the odd cells.
    ("backbone", "depth", "first"),
    [("tf_efficientnet_lite0", 4, 1), ("resnet18", 4, 0)],
)
def test_stride_16_has_every_second_cell_of_stride_8(backbone: str, depth: int | None, first: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        fine = Classifier(backbone, "gap", 2, depth).eval()
    coarse = Classifier(backbone, "gap", 2, depth, stride=16).eval()
    coarse.load_state_dict(fine.state_dict())
    x_NCHW = torch.rand(1, 3, 512, 544, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        fine_NChw, coarse_NChw = fine.stages(x_NCHW).deep, coarse.stages(x_NCHW).deep
    assert coarse_NChw.shape[2:] == (32, 34)
    second_NChw = fine_NChw[:, :, first::2, first::2]
    inside = (..., slice(13, -13), slice(13, -13))  # padding reaches farther than a margin
    torch.testing.assert_close(coarse_NChw[inside], second_NChw[inside], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(coarse_NChw[inside], fine_NChw[:, :, 1 - first :: 2, 1 - first :: 2][inside], atol=1e-2)


def test_the_classifier_with_resnet38d_has_the_head_of_the_paper() -> None:
    with torch.device("meta"):
        classifier = Classifier("resnet38d", "gap", 4)
        assert tuple(classifier(torch.empty(1, 3, 224, 224)).shape) == (1, 4)
    assert tuple(classifier.head.weight_KC.shape) == (4, 4096)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 105_070_912 + 4 * 4096


@pytest.mark.parametrize(
    ("backbone", "head", "named"),
    [("resnet9000", "gap", "resnet9000"), ("resnet18", "magic", "abn, area, gap, lfi, lfi-release, pcam")],
)
def test_an_unknown_architecture_is_named(backbone: str, head: str, named: str) -> None:
    with pytest.raises(ArchitectureError, match=named):
        Classifier(backbone, head, 2)


def test_resnet38d_has_stride_8_only() -> None:
    with pytest.raises(ArchitectureError, match="stride 8, not 16"), torch.device("meta"):
        Classifier("resnet38d", "gap", 2, stride=16)


@pytest.mark.parametrize("head", ["gap", "area", "pcam"])
@pytest.mark.parametrize("normalize", [False, True])
def test_in_training_the_head_reads_features_weighted_by_the_attention(
    head: str, normalize: bool, x_NCHW: torch.Tensor
) -> None:
    classifier = trained_classifier(head)
    stages = classifier.stages(x_NCHW)
    plain_NK = classifier.head_output(stages, x_NCHW).logits_NK
    classifier.mu, classifier.normalize_attention = 0.8, normalize
    attention = progressive_dropout_attention(stages.deep, classifier.head.weight_KC, 0.8, normalize=normalize)
    expected_NK = classifier.head(attention * stages.deep, x_NCHW).logits_NK
    assert torch.equal(classifier.head_output(stages, x_NCHW).logits_NK, expected_NK)
    assert not torch.allclose(expected_NK, plain_NK)
    classifier.eval()
    assert torch.equal(classifier.head_output(stages, x_NCHW).logits_NK, plain_NK)


def test_heads_of_layers_add_their_logits_in_training_only(x_NCHW: torch.Tensor) -> None:
    classifier = trained_classifier("area", ("shallow", "middle"))
    stages = classifier.stages(x_NCHW)
    output = classifier.head_output(stages, x_NCHW)
    expected = [classifier.layer_heads[layer](getattr(stages, layer), x_NCHW) for layer in ("shallow", "middle")]
    for actual_NK, one in zip(output.auxiliary_NK, expected, strict=True):
        assert torch.equal(actual_NK, one.logits_NK)
    assert torch.equal(classifier.layer_output("middle", stages, x_NCHW).map_NKhw, expected[1].map_NKhw)
    assert torch.equal(classifier.layer_output("deep", stages, x_NCHW).map_NKhw, output.map_NKhw)
    assert classifier.eval().head_output(stages, x_NCHW).auxiliary_NK == ()


def trained_classifier(head: str, layers: tuple[str, ...] = ()) -> Classifier:
    """Return a classifier in training mode that has no random or updated parts."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = Classifier("resnet18", head, 3, layers=layers)
    torch.nn.init.normal_(classifier.head.conv.weight, generator=torch.Generator().manual_seed(3))
    classifier.train()
    classifier.backbone.eval()
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
            module.p = 0.0
    return classifier
