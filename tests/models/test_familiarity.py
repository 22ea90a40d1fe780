from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf  # type: ignore[import-untyped]  # ships no types
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # ships no types

from models.backbone import Stages
from models.card import NO_DIGEST, ClassifierCard, FamiliarityCard, ModelCard
from models.classifier import Classifier
from models.errors import NonFiniteOutputError, WeightsMismatchError
from models.familiarity import (
    PENALTY,
    STEP,
    WINDOW,
    Changes,
    Statistics,
    fit_changes,
    fit_statistics,
    of_sources,
    shrunk_covariance,
    textures,
    window_features,
    window_starts,
)
from models.predictor import Predictor
from tests.models.networks import ConstantSegmenter, make_card

STRIDE = 8

CORNERS = [(0, 0)] * 5


def windows(count: int, features: int, seed: int = 0) -> NDArray[np.float32]:
    """Return correlated features of windows."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, features)) @ rng.normal(size=(features, features)) + 3).astype(np.float32)


@pytest.mark.parametrize("per_cell", [(4, 2), (2, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (42, 71), (12, 20), (70, 14)])
def test_features_are_means_and_deviations_of_the_channels_over_each_window(
    height: int, width: int, stride: int, per_cell: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    # Far from 0, so that a mean square is much larger than a variance.
    shallow, middle = (
        torch.randn((2, channels, factor * height, factor * width), generator=generator) * (n + 1) + 5
        for n, (channels, factor) in enumerate(zip((3, 2), per_cell, strict=True))
    )
    stages = Stages(shallow, middle, torch.zeros(2, 7, height, width))
    features_NrcC = window_features(textures(stages), stride).numpy()
    rows, columns = window_starts(height * stride), window_starts(width * stride)
    assert features_NrcC.shape == (2, len(rows), len(columns), 10)
    for image, row, column in np.ndindex(*features_NrcC.shape[:3]):
        y, x, side = rows[row] // stride, columns[column] // stride, WINDOW // stride
        parts = [
            map_NChw[image, :, factor * y : factor * (y + side), factor * x : factor * (x + side)].double().numpy()
            for map_NChw, factor in zip((shallow, middle), per_cell, strict=True)
        ]
        expected = [statistic(part_Chw, axis=(1, 2)) for statistic in (np.mean, np.std) for part_Chw in parts]
        assert features_NrcC[image, row, column] == pytest.approx(np.concatenate(expected), abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 0.2, 1.1, 3.4, 3.9])
def test_a_map_without_any_variation_has_deviations_of_zero(value: float) -> None:
    """Rounding makes the variance of some of these maps negative."""
    map_NChw = torch.full((1, 2, 14, 14), value)
    features_C = window_features(textures(Stages(map_NChw, map_NChw, map_NChw)), 16).flatten()
    assert features_C.tolist() == pytest.approx(4 * [value] + 4 * [0.0], abs=2e-3)


def test_textures_keep_the_digits_of_single_precision() -> None:
    map_NChw = torch.randn((1, 2, 14, 14), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) + 100
    found, expected = (textures(Stages(one, one, one)) for one in (map_NChw, map_NChw.float()))
    assert torch.equal(found, expected)


@given(st.integers(1, 3000))
def test_windows_cover_every_pixel_and_stay_inside(length: int) -> None:
    starts = window_starts(length)
    covered = {pixel for start in starts for pixel in range(start, start + WINDOW)}
    assert covered >= set(range(length))
    assert all(0 < following - start <= STEP for start, following in itertools.pairwise(starts))
    assert starts[-1] == max(0, length - WINDOW)


@pytest.mark.parametrize(("count", "features"), [(5, 8), (200, 8)])
def test_shrunk_covariance_is_that_of_scikit_learn(count: int, features: int) -> None:
    x_NC = windows(count, features).astype(np.float64)
    assert shrunk_covariance(x_NC) == pytest.approx(LedoitWolf().fit(x_NC).covariance_)


def test_equal_windows_have_a_covariance_of_zero() -> None:
    assert (shrunk_covariance(np.ones((4, 3))) == 0).all()


def test_distance_is_that_of_mahalanobis() -> None:
    x_NC = windows(50, 4)
    precision_CC = np.linalg.inv(shrunk_covariance(x_NC.astype(np.float64)))
    new_NC = windows(10, 4, seed=2)
    from_mean_NC = new_NC.astype(np.float64) - x_NC.mean(axis=0)
    expected_N = [np.sqrt(x @ precision_CC @ x) for x in from_mean_NC]
    assert fit_statistics(x_NC).distances(torch.from_numpy(new_NC)).numpy() == pytest.approx(expected_N, rel=1e-3)


def test_a_channel_that_is_constant_in_training_keeps_distances_finite() -> None:
    x_NC = windows(50, 4)
    x_NC[:, 2] = 1
    assert fit_statistics(x_NC).distances(torch.from_numpy(x_NC + 1)).isfinite().all()


def test_statistics_survive_their_file() -> None:
    statistics = fit_statistics(windows(50, 4))
    read = Statistics.from_bytes(statistics.as_bytes())
    assert torch.equal(read.mean_GC, statistics.mean_GC)
    assert torch.equal(read.whitening_GCC, statistics.whitening_GCC)


def test_statistics_of_the_features_of_an_earlier_version_are_refused() -> None:
    statistics = fit_statistics(windows(50, 4))
    earlier = safetensors.torch.save({"mean": statistics.mean_GC, "whitening": statistics.whitening_GCC})
    with pytest.raises(WeightsMismatchError, match=r"earlier version.* again with `wsi-familiarity.* remove"):
        Statistics.from_bytes(earlier)


def test_the_nearest_source_counts_in_units_of_its_limit() -> None:
    near, far = fit_statistics(windows(50, 4)), fit_statistics(windows(60, 4, seed=5) + 40)
    new_NC = torch.from_numpy(np.concatenate([windows(5, 4, seed=2), windows(5, 4, seed=3) + 40]))
    both = Statistics.from_bytes(of_sources([(near, 2.0), (far, 5.0)]).as_bytes())
    expected_N = torch.minimum(near.distances(new_NC) / 2, far.distances(new_NC) / 5)
    assert both.distances(new_NC).numpy() == pytest.approx(expected_N.numpy(), rel=1e-5)
    assert (near.distances(new_NC) / 2 < far.distances(new_NC) / 5).tolist() == [True] * 5 + [False] * 5


def test_bytes_other_than_statistics_are_refused() -> None:
    with pytest.raises(WeightsMismatchError, match="cannot be read"):
        Statistics.from_bytes(b"not a file of tensors")
    good = fit_statistics(windows(50, 4))
    with pytest.raises(WeightsMismatchError, match=r"means of shape \(1, 4\) and a whitening matrix of \(1, 4, 3\)"):
        Statistics.from_bytes(Statistics(good.mean_GC, good.whitening_GCC[..., :3]).as_bytes())


@pytest.mark.parametrize("name", ["source_mean", "source_whitening", "change_weight", "change_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_statistics_that_are_not_finite_in_single_precision_are_refused(name: str, value: float) -> None:
    """A distance of NaN is below every limit, so that the model would never warn."""
    statistics = dataclasses.replace(fit_statistics(windows(50, 3)), changes=regression())
    tensors = safetensors.torch.load(statistics.as_bytes())
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(WeightsMismatchError, match=f"contain NaN or infinity in {name}; make them again"):
        Statistics.from_bytes(safetensors.torch.save(tensors))


def regression(channels: int = 3) -> Changes:
    """Return the regression that tells windows of a Gaussian from two kinds of other windows."""
    kinds = [windows(30, channels, seed=1) + 4, windows(90, channels, seed=2) * 3]
    return fit_changes([windows(60, channels)], [[kind] for kind in kinds])


def test_the_regression_is_that_of_scikit_learn() -> None:
    familiar = [windows(60, 3), windows(20, 3, seed=7) + 1]
    kinds = [[windows(30, 3, seed=1) + 4, windows(8, 3, seed=6)], [windows(90, 3, seed=2) * 3, windows(5, 3, seed=3)]]
    changes = fit_changes(familiar, kinds)
    parts = [*familiar, *kinds[0], *kinds[1]]
    x_NC = np.concatenate(parts).astype(np.float64)
    training_NC = np.concatenate(familiar).astype(np.float64)
    values_C, vectors_CC = np.linalg.eigh(shrunk_covariance(training_NC))
    z_NC = np.clip((x_NC - training_NC.mean(axis=0)) @ vectors_CC / np.sqrt(values_C), -8, 8)
    assert np.abs(z_NC).max() == 8
    terms_NF = np.concatenate([z_NC, (z_NC**2 - 1) / np.sqrt(2)], axis=1)
    # Half of the weight for training windows, a quarter for each kind of change, in equal parts for both sources.
    shares = np.array([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])
    weight_N = np.concatenate(
        [np.full(len(part), share / len(part)) for part, share in zip(parts, shares, strict=True)]
    )
    reference = LogisticRegression(C=1 / PENALTY, tol=1e-10, max_iter=10_000)
    reference.fit(terms_NF, np.arange(len(x_NC)) >= 80, sample_weight=weight_N)
    expected_N = reference.decision_function(terms_NF)
    assert changes.logits(torch.from_numpy(x_NC.astype(np.float32))).numpy() == pytest.approx(expected_N, abs=2e-3)
    assert np.ptp(expected_N) > 4


def evidence_of(changes: Changes, features_NC: torch.Tensor) -> torch.Tensor:
    return changes.evidence((features_NC - changes.mean_C) @ changes.whitening_CC)


def test_evidence_is_the_scaled_logit_and_never_negative() -> None:
    changes = regression()
    x_NC = torch.from_numpy(np.concatenate([windows(60, 3), windows(90, 3, seed=2) * 3]))
    logit_N = changes.logits(x_NC)
    scaled = changes.scaled(-1.5, 0.5)
    assert scaled.logits(x_NC).numpy() == pytest.approx(((logit_N + 1.5) / 2 + 1).numpy(), abs=1e-4)
    evidence_N = evidence_of(changes.scaled(-0.2, 0.2), x_NC)
    assert evidence_N.numpy() == pytest.approx(((logit_N + 0.2) / 0.4 + 1).clamp_min(0).numpy(), abs=1e-3)
    assert evidence_N.min() == 0


def test_a_distance_is_the_sum_of_both_parts_and_survives_the_file() -> None:
    plain, changes = fit_statistics(windows(50, 3)), regression().scaled(-1, 1)
    statistics = Statistics.from_bytes(dataclasses.replace(plain, changes=changes).as_bytes())
    x_NC = torch.from_numpy(windows(20, 3, seed=4))
    assert torch.equal(statistics.distances(x_NC), plain.distances(x_NC) + evidence_of(changes, x_NC))
    assert torch.equal(statistics.to(torch.device("cpu")).distances(x_NC), statistics.distances(x_NC))
    assert torch.equal(plain.scaled(2).distances(x_NC), 2 * plain.distances(x_NC))
    assert torch.equal(statistics.scaled(2).distances(x_NC), 2 * statistics.distances(x_NC))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("change_mean", None, "cannot be read: 'change_mean'"),
        ("change_weight", torch.zeros(3), r"3 channels: .*change_weight \(3,\)"),
        ("change_bias", torch.zeros(1), r"3 channels: .*change_bias \(1,\)"),
        ("change_bias", None, "cannot be read: 'change_bias'"),
    ],
)
def test_a_regression_that_does_not_fit_is_refused(name: str, tensor: torch.Tensor | None, message: str) -> None:
    statistics = dataclasses.replace(fit_statistics(windows(50, 3)), changes=regression())
    tensors = safetensors.torch.load(statistics.as_bytes())
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(WeightsMismatchError, match=message):
        Statistics.from_bytes(safetensors.torch.save(tensors))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier("tf_efficientnet_lite0", "gap", 2, 3).eval()


def striped_tiles(count: int, period: int, seed: int) -> NDArray[np.uint8]:
    """Return 256-px tiles of noisy stripes with this period."""
    noise_NHW1 = np.random.default_rng(seed).integers(0, 60, (count, 256, 256, 1))
    stripes_W1 = (np.arange(256) // period % 2 * 120)[:, None]
    return np.broadcast_to(noise_NHW1 + stripes_W1, (count, 256, 256, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def statistics(classifier: Classifier) -> tuple[Statistics, ModelCard]:
    """Return the statistics of stripes that are 8 px wide, and the card of their model."""
    x_NCHW = torch.from_numpy(striped_tiles(24, 8, seed=0)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        features_NC = window_features(textures(classifier.stages(x_NCHW)), STRIDE).flatten(0, 2)
        changed_NC = window_features(textures(classifier.stages(1 - x_NCHW)), STRIDE).flatten(0, 2)
    changes = fit_changes([features_NC.numpy()], [[changed_NC.numpy()]])
    # So that the tiles of these tests have evidence.
    changes = changes.scaled(-20, 20)
    found = dataclasses.replace(fit_statistics(features_NC.numpy()), changes=changes)
    limit = float(found.distances(features_NC).max()) + 1.0
    card = make_card().model_copy(
        update={
            "classifier": ClassifierCard(backbone="tf_efficientnet_lite0", head="gap", depth=3),
            "familiarity": FamiliarityCard(statistics=NO_DIGEST, window_limit=limit, share_limit=0.5),
        }
    )
    return found, card


def predictor(classifier: Classifier, statistics: tuple[Statistics, ModelCard], **options: object) -> Predictor:
    found, card = statistics
    segmenter = ConstantSegmenter([0.0, 1.0])
    return Predictor(card, NO_DIGEST, classifier, segmenter, statistics=found, **options)  # type: ignore[arg-type]  # values of several types


def test_a_predictor_measures_the_distance_of_every_window_in_units_of_the_limit(
    classifier: Classifier, statistics: tuple[Statistics, ModelCard]
) -> None:
    familiar_Nrc = predictor(classifier, statistics).predict(striped_tiles(3, 8, seed=1), CORNERS[:3]).distances_Nrc
    unfamiliar_Nrc = predictor(classifier, statistics).predict(striped_tiles(3, 64, seed=1), CORNERS[:3]).distances_Nrc
    assert familiar_Nrc is not None
    assert unfamiliar_Nrc is not None
    assert familiar_Nrc.shape == unfamiliar_Nrc.shape == (3, 2, 2)
    assert familiar_Nrc.max() < unfamiliar_Nrc.min()
    found, card = statistics
    x_NCHW = torch.from_numpy(striped_tiles(3, 64, seed=1)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        features_NC = window_features(textures(classifier.stages(x_NCHW)), STRIDE).flatten(0, 2)
    expected_N = found.distances(features_NC)
    assert card.familiarity is not None
    assert found.changes is not None
    # Without the evidence, the distances would differ by more than the tolerance below.
    evidence_N = evidence_of(found.changes, features_NC)
    assert (evidence_N > 1e-3 * expected_N).all()
    assert unfamiliar_Nrc.ravel() == pytest.approx(expected_N.numpy() / card.familiarity.window_limit, rel=1e-4)


def test_a_distance_that_is_not_finite_is_an_error(
    classifier: Classifier, statistics: tuple[Statistics, ModelCard]
) -> None:
    """Large statistics can be finite, but not the distances."""
    found, card = statistics
    huge = dataclasses.replace(found, mean_GC=torch.full_like(found.mean_GC, 3e38))
    with pytest.raises(NonFiniteOutputError, match=r"is NaN or infinite for 2 image\(s\).*the weights are damaged"):
        predictor(classifier, (huge, card)).predict(striped_tiles(2, 8, seed=1), CORNERS[:2])


def test_the_distance_of_a_canvas_does_not_depend_on_its_batch(
    classifier: Classifier, statistics: tuple[Statistics, ModelCard]
) -> None:
    tiles_NHWC = np.concatenate([striped_tiles(2, 8, seed=3), striped_tiles(3, 32, seed=3)])
    together_Nrc = predictor(classifier, statistics, batch_size=5).predict(tiles_NHWC, CORNERS).distances_Nrc
    alone_Nrc = predictor(classifier, statistics, batch_size=1).predict(tiles_NHWC, CORNERS).distances_Nrc
    assert together_Nrc == pytest.approx(alone_Nrc, rel=1e-4)


def test_statistics_do_not_change_the_prediction(
    classifier: Classifier, statistics: tuple[Statistics, ModelCard]
) -> None:
    tiles_NHWC = striped_tiles(2, 16, seed=4)
    plain = Predictor(statistics[1], NO_DIGEST, classifier, ConstantSegmenter([0.0, 1.0]))
    assert plain.predict(tiles_NHWC, CORNERS[:2]).distances_Nrc is None
    ours, plains = (one.presence(tiles_NHWC, CORNERS[:2]) for one in (predictor(classifier, statistics), plain))
    torch.testing.assert_close(torch.stack(ours), torch.stack(plains), rtol=0, atol=1e-6)


def test_openvino_measures_the_same_distances(classifier: Classifier, statistics: tuple[Statistics, ModelCard]) -> None:
    tiles_NHWC = striped_tiles(2, 16, seed=5)
    tiles_NHWC = np.concatenate([tiles_NHWC, tiles_NHWC], axis=2)
    torch_Nrc = predictor(classifier, statistics).predict(tiles_NHWC, CORNERS[: len(tiles_NHWC)]).distances_Nrc
    openvino_Nrc = (
        predictor(classifier, statistics, runtime="openvino")
        .predict(tiles_NHWC, CORNERS[: len(tiles_NHWC)])
        .distances_Nrc
    )
    assert torch_Nrc is not None
    assert torch_Nrc.shape == (2, 2, 4)
    assert openvino_Nrc == pytest.approx(torch_Nrc, rel=1e-3)
