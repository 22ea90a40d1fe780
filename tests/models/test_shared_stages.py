"""What the two networks of a bundle share: the first stages, or the whole backbone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import device_networks
from models.bundle import load_bundle, load_networks, shipped_bundles
from models.card import NO_DIGEST, FamiliarityCard
from models.errors import ArchitectureError
from models.familiarity import fit_statistics, textures, window_features
from models.padding import ExtendedConv2d, pad_before_expansion
from models.predictor import Predictor
from models.runtimes import Runtime
from models.segmenter import NATIVE_STRIDE, RIM, CoreSegmenter, build_segmenter, share_backbone
from models.shared_stages import DeepFeatures, split_networks, unshared
from tests.models.networks import (
    LITE,
    ConstantClassifier,
    ConstantSegmenter,
    sharing_networks,
    timm_networks,
    vary_decoder,
)


def images(seed: int, side: int = 160) -> Tensor:
    return torch.randn((2, 3, side, side + 32), generator=torch.Generator().manual_seed(seed))


def test_the_parts_compute_what_the_whole_networks_compute() -> None:
    classifier, segmenter = timm_networks()
    for module in segmenter.encoder.modules():  # the padding of the classifier, so that nothing differs
        if isinstance(module, ExtendedConv2d):
            module.mode = "replicate"
    x_NCHW = images(1)
    split = split_networks(classifier, segmenter, 64)
    assert split.first is not None
    assert split.shared_deep is None
    channels, stride = split.start
    with torch.inference_mode():
        features_NChw = split.first(x_NCHW)
        assert features_NChw.shape == (2, channels, 160 // stride, 192 // stride)
        assert torch.equal(split.deep(features_NChw), DeepFeatures(classifier)(x_NCHW))
        assert torch.equal(split.segmenter(features_NChw), CoreSegmenter(segmenter, 64)(x_NCHW))


@pytest.mark.parametrize("backbone", [LITE, "tf_efficientnet_b0", "test_efficientnet_gn", "mixnet_s"])
@pytest.mark.parametrize("depth", [4, 5])
def test_a_backbone_that_both_networks_have_is_computed_once(backbone: str, depth: int) -> None:
    """This includes squeeze-and-excitation, group norms and mixed convolutions: equal padding gives equal features."""
    classifier, segmenter = sharing_networks(backbone=backbone, depth=depth)
    vary_decoder(segmenter)
    x_NCHW = images(4, side=256)
    split = split_networks(classifier, segmenter, 64)
    assert split.first is not None
    with torch.inference_mode():
        fine_NChw = split.first(x_NCHW)
        maps = fine_NChw, split.deep(fine_NChw)
        assert [(one.shape[1], 256 // one.shape[2]) for one in maps] == [split.start, split.shared_deep]
        assert [one.shape[2] for one in maps] == [256 // 4, 256 // 16]
        assert torch.equal(maps[-1], DeepFeatures(classifier)(x_NCHW))
        textured = split_networks(classifier, segmenter, 64, textured=True).deep(fine_NChw)
        stages = classifier.stages(x_NCHW)
        assert torch.equal(textured[0], stages.deep)
        assert torch.equal(textured[1], textures(stages))
        # The decoder reads the deep features of the ring around the margin of 64, and 16 px of fine features.
        found_NKhw = split.segmenter(fine_NChw[:, :, 20:-20, 20:-20], maps[1])
        edge = 96 // NATIVE_STRIDE - RIM
        whole_NKhw = segmenter(x_NCHW)
        torch.testing.assert_close(found_NKhw, whole_NKhw[:, :, edge:-edge, edge:-edge], atol=1e-6, rtol=1e-5)


def test_networks_whose_textures_lie_before_the_shared_stages_share_nothing() -> None:
    """With three stages, the shallow one has stride 2."""
    classifier, segmenter = sharing_networks(depth=3)
    x_NCHW = images(5)
    assert split_networks(classifier, segmenter, 64).first is not None
    split = split_networks(classifier, segmenter, 64, textured=True)
    assert split.first is None
    with torch.inference_mode():
        assert torch.equal(split.deep(x_NCHW)[1], textures(classifier.stages(x_NCHW)))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_canvases_of_one_image_have_the_textures_of_their_own_places(batch_size: int) -> None:
    """Distances are those of the windows of the whole image, which shares no canvas."""
    card = load_bundle("colon-gland").card
    familiarity = FamiliarityCard(statistics=NO_DIGEST, window_limit=1, share_limit=0.5)
    card = card.model_copy(update={"gate_thresholds": (0.0, 0.0), "familiarity": familiarity})
    networks = sharing_networks()
    rgb_HWC = np.random.default_rng(0).integers(0, 256, (320, 896, 3), dtype=np.uint8)
    rgb_HWC[:, 448:] = 255
    mean_C, std_C = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
    x_NCHW = torch.from_numpy(rgb_HWC).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        maps_NEhw = textures(networks[0].stages((x_NCHW - mean_C) / std_C))

    def features_of(rows: slice, columns: slice) -> Tensor:
        part_NEhw = maps_NEhw[..., rows.start // 16 : rows.stop // 16, columns.start // 16 : columns.stop // 16]
        return window_features(part_NEhw, 16).flatten(0, 2)

    places = [(slice(0, 320), slice(first, last)) for first, last in ((0, 320), (192, 576), (448, 896))]
    near_C = features_of(*places[0])[0].numpy()
    spread_NC = 0.05 * np.random.default_rng(1).normal(size=(500, len(near_C)))
    statistics = fit_statistics((near_C + spread_NC).astype(np.float32))
    options: dict[str, Any] = {"device": "cpu", "statistics": statistics, "batch_size": batch_size}
    predictor = Predictor(card, NO_DIGEST, *networks, **options)
    cores = [(64, 64), (256, 64), (512, 64)]
    probs = [torch.empty((2, 192 // 4, (columns.stop - columns.start - 128) // 4)) for _, columns in places]
    found = predictor.predict_into(probs, torch.from_numpy(rgb_HWC), places, cores).distances
    assert found is not None
    largest = max(float(distances_rc.max()) for distances_rc in found)
    for place, distances_rc in zip(places, found, strict=True):
        expected_rc = statistics.distances(features_of(*place)).numpy().reshape(distances_rc.shape)
        # The windows in which the backbone runs have less context than the image.
        assert distances_rc == pytest.approx(expected_rc, abs=0.03 * largest)
    # Noise, both, and glass.
    assert found[0].max() < 0.1 * largest
    assert np.ptp(found[1]) > 0.3 * largest
    assert found[2].min() > 0.9 * largest


@pytest.mark.parametrize("options", [{"stride": 8}, {"edges_too": False}])
def test_backbones_that_dilate_or_pad_differently_share_the_first_stages_only(options: dict[str, Any]) -> None:
    split = split_networks(*sharing_networks(**options), 64)
    assert split.first is not None
    assert split.start == (24, 4)
    assert split.shared_deep is None


def test_a_classifier_with_layers_after_its_stages_shares_the_first_stages_only() -> None:
    classifier, segmenter = sharing_networks()
    classifier.backbone.net.conv_head = nn.Conv2d(112, 112, 1)
    assert split_networks(classifier, segmenter, 64).shared_deep is None


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_shared_backbone_gives_the_probabilities_and_distances_of_two_networks(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(runtime)
    card = load_bundle("colon-gland").card
    familiarity = FamiliarityCard(statistics=NO_DIGEST, window_limit=2, share_limit=0.5)
    card = card.model_copy(
        update={"classes": card.classes[:2], "gate_thresholds": (0.0, 0.0), "familiarity": familiarity}
    )
    rgb_NHWC = np.random.default_rng(0).integers(0, 256, (2, 256, 352, 3), dtype=np.uint8)
    rgb_NHWC[1, :, 100:] //= 2
    corners = [(0, 0), (256, 0)]

    def found(*, share: bool) -> list[Tensor]:
        networks = sharing_networks()
        features = 2 * sum(networks[0].backbone.stage_channels[:2])
        statistics = fit_statistics(np.random.default_rng(1).normal(size=(500, features)).astype(np.float32))
        predictor = Predictor(card, NO_DIGEST, *networks, device="cpu", runtime=runtime, statistics=statistics)
        assert (predictor._networks._first is not None) == share
        distances_Nrc = predictor.predict(rgb_NHWC, corners).distances_Nrc
        assert distances_Nrc is not None
        assert distances_Nrc.shape == (2, 2, 3)
        assert np.ptp(distances_Nrc) > 0.1
        return [predictor.logits(rgb_NHWC), *predictor.presence(rgb_NHWC, corners), torch.from_numpy(distances_Nrc)]

    shared = found(share=True)
    monkeypatch.setattr(device_networks, "split_networks", unshared)
    for ours, other in zip(shared, found(share=False), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_a_segmenter_with_another_encoder_cannot_take_the_backbone() -> None:
    classifier, _ = sharing_networks()
    with pytest.raises(ArchitectureError, match="cannot share"):
        share_backbone(build_segmenter("tu-tf_efficientnet_lite1", 2, keeps_backbone=True), classifier)


def test_another_padding_of_the_shared_stages_reaches_nine_pixels() -> None:
    classifier, segmenter = timm_networks()
    x_NCHW = images(2)
    encoder: Any = segmenter.encoder.model
    with torch.inference_mode():
        first = split_networks(classifier, segmenter, 64).first
        assert first is not None
        own_NChw = nn.Sequential(encoder.conv_stem, encoder.bn1, *encoder.blocks[:2])(x_NCHW)
        differs_hw = (first(x_NCHW) != own_NChw).any(dim=1).any(dim=0)
    assert split_networks(classifier, segmenter, 9).first is not None
    assert split_networks(classifier, segmenter, 8).first is None
    assert differs_hw.any()
    cells = -(-9 // 4)
    assert not differs_hw[cells:-cells, cells:-cells].any()


@pytest.mark.parametrize("backbone", ["tf_efficientnet_b0", "test_efficientnet_gn"])
def test_stages_that_average_the_whole_canvas_are_not_shared(backbone: str) -> None:
    """Squeeze-and-excitation carries the padding to every pixel, and so does a group norm."""
    classifier, segmenter = timm_networks(backbone=backbone)
    assert split_networks(classifier, segmenter, 64).first is None


def test_stages_that_pad_on_other_sides_are_not_shared() -> None:
    classifier, segmenter = timm_networks()
    stem = classifier.backbone.net.conv_stem
    stem.edges = stem.edges[::-1]
    assert split_networks(classifier, segmenter, 64).first is None


@pytest.mark.parametrize("whole", [False, True])
def test_the_predictor_computes_with_parts_in_eval_mode_on_its_device(whole: bool) -> None:
    classifier, segmenter = (network.train() for network in (sharing_networks() if whole else timm_networks()))
    predictor = Predictor(load_bundle("colon-gland").card, NO_DIGEST, classifier, segmenter, device="cpu")
    parts: Any = predictor._networks
    used: list[Any] = [parts._first, parts._classifier, parts._deep, parts._segmenter]
    assert (parts.shared_stride is not None) == whole
    assert not any(module.training for part in used for module in part.modules())
    # The head moves to the device with the stages before it.
    assert whole or parts._deep.classifier is parts._classifier
    assert classifier.training
    assert segmenter.training


def test_splitting_leaves_the_networks_alone() -> None:
    classifier, segmenter = timm_networks()
    before = copy.deepcopy((classifier, segmenter))
    split_networks(classifier, segmenter, 64)
    with torch.inference_mode():
        for network, kept in zip((classifier, segmenter), before, strict=True):
            assert torch.equal(network(images(3)), kept(images(3)))


def test_networks_that_start_differently_share_nothing() -> None:
    other = timm_networks()
    with torch.no_grad():
        other[1].encoder.model.blocks[1][0].conv_dw.weight[0, 0, 0, 0] += 1e-7
    for classifier, segmenter in (
        timm_networks(frozen=False),
        timm_networks(backbone="resnet18", depth=None, frozen=False),
        timm_networks(backbone="tf_efficientnet_lite1", frozen=False),
        (timm_networks()[0], build_segmenter("resnet18", 2).eval()),
        (ConstantClassifier([0.5, 0.5]), ConstantSegmenter([0, 0])),
        other,
    ):
        split = split_networks(classifier, segmenter, 64)
        assert (split.first, split.start, split.classifier) == (None, (3, 1), classifier)
        assert isinstance(split.segmenter, CoreSegmenter)
        assert split.segmenter.segmenter is segmenter


@pytest.mark.parametrize("name", shipped_bundles())
def test_the_shipped_models_share_what_their_cards_state(name: str) -> None:
    bundle = load_bundle(name)
    classifier, segmenter = load_networks(bundle)
    # As loaded, and with the padding moved before the expansion, as in a run.
    for networks in ((classifier, segmenter), (pad_before_expansion(classifier), pad_before_expansion(segmenter))):
        split = split_networks(*networks, bundle.card.margin)
        assert split.first is not None
        assert (split.shared_deep is not None) == bundle.card.segmenter.shared_backbone


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_segmenter_starts_from_the_features_of_its_own_canvas(batch_size: int) -> None:
    """One canvas of three has a single class left, and the segmenter skips it."""
    classifier, segmenter = timm_networks()
    rgb_NHWC = np.random.default_rng(0).integers(0, 256, (3, 192, 192, 3), dtype=np.uint8)
    rgb_NHWC[0], rgb_NHWC[2] = 255, 235
    corners = [(256 * n, 0) for n in range(3)]

    def predictor(**options: Any) -> Predictor:
        return Predictor(card, NO_DIGEST, classifier, segmenter, device="cpu", **options)

    card = load_bundle("colon-gland").card
    presences = [one.flatten(0, 1) for one in predictor().presence(rgb_NHWC, corners)]
    # A threshold that only the canvas of noise fails.
    lowest, noise = min(float(presences[n][:, 1].min()) for n in (0, 2)), float(presences[1][:, 1].max())
    assert noise < lowest
    card = card.model_copy(update={"gate_thresholds": (0.0, (noise + lowest) / 2)})
    found = predictor(batch_size=batch_size).predict(rgb_NHWC, corners)
    assert found.segmented_N.tolist() == [True, False, True]
    logits_NKhw = predictor().logits(rgb_NHWC)
    for n in (0, 2):
        assert torch.allclose(found.probs_NKhw[n], logits_NKhw[n].softmax(dim=0), atol=1e-6)
