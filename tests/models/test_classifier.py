from __future__ import annotations

import pytest
import torch

from models.classifier import Classifier
from models.errors import ArchitectureError
from models.heads import HEADS


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
    assert tuple(output.map_NKhw.shape) == (2, 1 if head in ("lfi", "abn") else 3, 8, 12)
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


def test_the_classifier_with_resnet38d_has_the_head_of_the_paper() -> None:
    with torch.device("meta"):
        classifier = Classifier("resnet38d", "pda", 4)
        assert tuple(classifier(torch.empty(1, 3, 224, 224)).shape) == (1, 4)
    assert tuple(classifier.head.weight_KC.shape) == (4, 4096)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 105_070_912 + 4 * 4096


@pytest.mark.parametrize(
    ("backbone", "head", "named"),
    [("resnet9000", "gap", "resnet9000"), ("resnet18", "magic", "abn, area, gap, lfi, pcam, pda")],
)
def test_an_unknown_architecture_is_named(backbone: str, head: str, named: str) -> None:
    with pytest.raises(ArchitectureError, match=named):
        Classifier(backbone, head, 2)
