"""Score-CAM is that of the public libraries and of the released loop, with at most a chunk of images in each pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Stages
from models.classifier import Classifier
from models.errors import CamUnavailableError
from models.score_cam import ScoreCamVariant, score_cam
from tests.cases import full
from tests.models.cam_comparison import CLASSES, assert_close, module, their_map


@pytest.mark.full
@pytest.mark.parametrize("k", [full(0), 1, full(2)])
@pytest.mark.parametrize("variant", ["torch-cam", full("pytorch-grad-cam")])
def test_score_cam_variants_agree_with_the_libraries_they_are_named_after(
    classifier: Classifier, small_NCHW: Tensor, variant: ScoreCamVariant, k: int
) -> None:
    """torch-cam includes its ReLU and pytorch-grad-cam does not; for positive features that is the same."""
    ours = score_cam(classifier, small_NCHW, "shallow", variant=variant, chunk=50)
    layer = module(classifier, "shallow")
    if variant == "torch-cam":
        methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
        with methods.ScoreCAM(classifier, layer, batch_size=64) as theirs, torch.no_grad():
            classifier(small_NCHW)
            assert_close(ours[:, k], theirs(k, normalized=False)[0])
    else:
        library = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
        with library.ScoreCAM(model=classifier, target_layers=[layer]) as theirs:
            assert_close(ours[:, k], their_map(theirs, small_NCHW, layer, k))


def official_score_cam(classifier: Classifier, x_1CHW: Tensor, activation_1Chw: Tensor) -> Tensor:
    """Return the map (1, K, H, W) by the loop of the release, before its final min-max.

    Alpha is the softmax over the classes, and constant channels are skipped. All classes share one pass per channel.
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


@pytest.mark.full
def test_official_score_cam_equals_the_released_loop(
    classifiers: Callable[[str], Classifier], small_NCHW: Tensor
) -> None:
    classifier = classifiers("gap")
    ours = score_cam(classifier, small_NCHW, "shallow")
    up = F.interpolate(ours, (32, 32), mode="bilinear", align_corners=False)
    for n in range(2):
        x_1CHW = small_NCHW[n : n + 1]
        assert_close(up[n : n + 1], official_score_cam(classifier, x_1CHW, classifier.stages(x_1CHW).shallow))


@pytest.mark.full
@pytest.mark.parametrize("variant", ["official", "torch-cam", "pytorch-grad-cam"])
def test_score_cam_depends_neither_on_the_chunk_nor_on_the_batch(
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
    # The images, the blank image, and the channels that vary.
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
    with pytest.raises(CamUnavailableError, match="use one of official, torch-cam, pytorch-grad-cam"):
        score_cam(classifier, x_NCHW, variant=variant)
