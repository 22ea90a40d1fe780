"""Attacks on the promise that the grid of a run does not show in its map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models import device_networks
from models.bundle import DEFAULT_BUNDLE, load_bundle, load_networks, shipped_bundles
from models.predictor import Predictor
from models.segmenter import build_segmenter
from models.shared_stages import unshared
from tests.bench.lattice import shifted_labels
from tests.bench.lattice_cores import make_predictor


def changed_share(slide: Path, model: str, margin: int | None = None, canvas_m: int | None = None) -> float:
    """Return the share of the labels inside the tissue that change if the grid moves by half a cell of a canvas.

    The networks' strides divide 16 pixels, so only canvases and gate windows move over the tissue.
    """
    predictor = make_predictor(model, margin, output_stride=1)
    before_HW, inside_HW, _ = shifted_labels(slide, predictor, canvas_m, 0)
    after_HW, also_HW, _ = shifted_labels(slide, predictor, canvas_m, 16)
    counted_HW = inside_HW[16:, 16:] & also_HW
    assert counted_HW.sum() > 200_000
    return float((before_HW[16:, 16:] != after_HW)[counted_HW].mean())


@pytest.mark.parametrize("model", shipped_bundles())
def test_a_shifted_grid_changes_few_labels(sample_slide: Path, model: str) -> None:
    share = changed_share(sample_slide, model)
    assert share < 0.005
    # With many borders and little real context, the canvases show: the attack can fail.
    assert changed_share(sample_slide, model, margin=16, canvas_m=192) > 2 * share


def test_sharing_the_first_stages_changes_few_labels(sample_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edge of a canvas, shared stages pad as the classifier does."""

    def labels(margin: int | None) -> NDArray[np.uint8]:
        return shifted_labels(sample_slide, predictor_of_two_backbones(margin), None, 0)[0]

    shared_HW, without_context_HW = labels(None), labels(16)
    monkeypatch.setattr(device_networks, "split_networks", unshared)
    assert (shared_HW != labels(None)).mean() < 0.0005
    assert (without_context_HW != labels(16)).any()  # the networks do differ


def predictor_of_two_backbones(margin: int | None) -> Predictor:
    """Return a predictor of the default model, whose segmenter gets the backbone as its own and mirrors the edges."""
    bundle = load_bundle(DEFAULT_BUNDLE)
    classifier, shared = load_networks(bundle)
    parts = bundle.card.segmenter
    own = build_segmenter(parts.encoder, len(bundle.card.classes), parts.depth, parts.rates, parts.decoder_channels)
    own.load_state_dict(shared.state_dict())
    changes = {"segmenter": parts.model_copy(update={"shared_backbone": False, "trains_backbone": False})}
    card = bundle.card.model_copy(update=changes | ({} if margin is None else {"margin": margin}))
    return Predictor.from_networks(
        card, bundle.digest, classifier, own.eval(), device="cpu", runtime="auto", output_stride=1
    )
