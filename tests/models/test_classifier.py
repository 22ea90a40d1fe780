from __future__ import annotations

import numpy as np
import pytest
import torch

from models.classifier import PDA_SCHEDULES, Classifier, GapHead, PdaHead, progressive_dropout_attention
from models.errors import ArchitectureError


def slow_attention(deep_NChw: np.ndarray, weight_KC: np.ndarray, mu: float) -> np.ndarray:
    """The definition, pixel by pixel in float64."""
    images, channels, height, width = deep_NChw.shape
    classes = len(weight_KC)
    attention = np.zeros((images, 1, height, width))
    for n in range(images):
        for k in range(classes):
            cam = np.zeros((height, width))
            for y in range(height):
                for x in range(width):
                    cam[y, x] = max(0.0, sum(weight_KC[k, c] * deep_NChw[n, c, y, x] for c in range(channels)))
            beta = mu * cam.max()
            for y in range(height):
                for x in range(width):
                    attention[n, 0, y, x] += (0.0 if cam[y, x] > beta else cam[y, x]) / classes
    return attention


@pytest.mark.parametrize("mu", [1.0, 0.83, 0.65])
def test_attention_agrees_with_the_definition(mu: float) -> None:
    rng = np.random.default_rng(1)
    deep_NChw, weight_KC = rng.normal(size=(3, 5, 4, 6)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    actual = progressive_dropout_attention(torch.from_numpy(deep_NChw), torch.from_numpy(weight_KC), mu)
    np.testing.assert_allclose(actual, slow_attention(deep_NChw, weight_KC, mu), rtol=1e-4, atol=1e-5)


def test_normalised_attention_has_maximum_one_per_image() -> None:
    deep_NChw = torch.rand(3, 5, 4, 4)
    attention = progressive_dropout_attention(deep_NChw, torch.rand(2, 5), 0.8, normalise=True)
    assert torch.allclose(attention.amax(dim=(1, 2, 3)), torch.ones(3))


def test_attention_is_float32_for_half_precision_features() -> None:
    deep_NChw, weight_KC = torch.rand(1, 4, 3, 3).bfloat16(), torch.rand(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = progressive_dropout_attention(deep_NChw, weight_KC, 0.9)
    assert attention.dtype == torch.float32
    assert torch.equal(attention, progressive_dropout_attention(deep_NChw.float(), weight_KC, 0.9))


def test_paper_schedule_holds_one_for_three_epochs_then_decays_to_its_lower_bound() -> None:
    paper = PDA_SCHEDULES["paper"]
    assert [paper.mu(epoch) for epoch in range(5)] == pytest.approx([1, 1, 1, 0.985, 0.985**2])
    assert paper.mu(1000) == 0.65
    assert paper.applied(0)


def test_release_schedule_decays_after_epoch_0_and_applies_from_epoch_3() -> None:
    release = PDA_SCHEDULES["release"]
    assert [release.mu(epoch) for epoch in range(4)] == pytest.approx([1, 0.98, 0.98**2, 0.98**3])
    assert release.mu(1000) == 0.65
    assert [release.applied(epoch) for epoch in range(5)] == [False, False, False, True, True]


def test_pda_head_without_attention_equals_gap_head() -> None:
    gap, pda = GapHead(6, 3), PdaHead(6, 3)
    pda.load_state_dict(gap.state_dict())
    pda.mu = 0.8
    deep_NChw = torch.rand(2, 6, 5, 5)
    assert torch.equal(gap.eval()(deep_NChw), pda.eval()(deep_NChw))


def test_pda_head_weighs_features_with_the_attention_in_training() -> None:
    head = PdaHead(6, 3, normalise=False).train()
    head.dropout.p = 0.0
    head.mu = 0.8
    deep_NChw = torch.rand(2, 6, 5, 5)
    attended = progressive_dropout_attention(deep_NChw, head.weight_KC, 0.8) * deep_NChw
    expected = attended.mean(dim=(2, 3)) @ head.weight_KC.T
    assert torch.allclose(head(deep_NChw), expected, atol=1e-6)


def test_all_three_stages_have_output_stride_8() -> None:
    classifier = Classifier("tf_efficientnet_lite0", "gap", 2).eval()
    with torch.inference_mode():
        stages = classifier.stages(torch.rand(1, 3, 64, 96))
    assert [tuple(stage.shape) for stage in stages] == [(1, 40, 8, 12), (1, 112, 8, 12), (1, 1280, 8, 12)]
    assert classifier.head.conv.bias is None


@pytest.mark.parametrize(
    ("backbone", "head", "named"), [("resnet9000", "gap", "resnet9000"), ("resnet18", "magic", "gap, pda")]
)
def test_unknown_architecture_is_named(backbone: str, head: str, named: str) -> None:
    with pytest.raises(ArchitectureError, match=named):
        Classifier(backbone, head, 2)
