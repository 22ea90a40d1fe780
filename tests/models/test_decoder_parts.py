"""The parts of cores in which the decoder runs: they cover a core once and change nothing but the time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import device_networks
from models.backbone_windows import Place
from models.bundle import load_bundle
from models.canvas_pass import Decisions
from models.card import NO_DIGEST
from models.decoder_parts import PART_SIDE, cut, parts_of
from models.predictor import Predictor
from models.runtimes import Runtime
from tests.cases import needs_openvino
from tests.models.networks import sharing_networks

MARGIN = 64
CORES = [(96, 160), (160, 96), (32, 32), (256, 320)]
"""Height and width of the cores, which lie side by side in one row."""


@given(st.integers(1, 60).map(lambda n: 32 * n), st.integers(1, 60).map(lambda n: 32 * n), st.sampled_from([32, 256]))
def test_parts_cover_a_core_once_and_have_few_sizes(height: int, width: int, side: int) -> None:
    covered_HW = np.zeros((height, width), int)
    sizes = set()
    for rows, columns in parts_of((height, width), side):
        assert 0 < rows.stop - rows.start <= side
        assert 0 < columns.stop - columns.start <= side
        covered_HW[rows, columns] += 1
        sizes.add((rows.stop - rows.start, columns.stop - columns.start))
    assert (covered_HW == 1).all()
    assert len(sizes) <= 4
    assert parts_of((height, width), None) == [(slice(0, height), slice(0, width))]


def test_a_part_of_a_map_has_its_surroundings() -> None:
    map_HW = torch.arange(12 * 12).view(12, 12)  # a core of 128 px and 32 px around it, at stride 16
    found_hw = cut(map_HW, (slice(64, 128), slice(0, 32)), 32, 16)
    assert torch.equal(found_hw, map_HW[4:12, 0:6])


class _Run:
    """The predictions for cores side by side, with random weights."""

    def __init__(self, runtime: Runtime, part_side: int, **options: Any) -> None:
        card = load_bundle("colon-gland").card
        own = {"margin": MARGIN, "familiarity": None, "gate_thresholds": (0.0, 0.0)}
        card = card.model_copy(update=own | options.pop("card", {}))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(device_networks, "PART_SIDE", part_side)
            self.predictor = Predictor(card, NO_DIGEST, *sharing_networks(), device="cpu", runtime=runtime, **options)
        lefts = np.cumsum([0, *(width for _, width in CORES)])
        self.places: list[Place] = [
            (slice(0, height + 2 * MARGIN), slice(left, left + width + 2 * MARGIN))
            for left, (height, width) in zip(lefts.tolist(), CORES, strict=False)
        ]
        rgb_HWC = np.random.default_rng(0).integers(0, 256, (256 + 2 * MARGIN, lefts[-1] + 2 * MARGIN, 3), np.uint8)
        rgb_HWC[:, 300:] = 255
        self.rgb_HWC = torch.from_numpy(rgb_HWC)
        self.corners = [(columns.start + MARGIN, MARGIN) for _, columns in self.places]

    def predict(self) -> tuple[list[Tensor], Decisions]:
        probs = [torch.full((2, height // 4, width // 4), torch.nan) for height, width in CORES]
        return probs, self.predictor.predict_into(probs, self.rgb_HWC, self.places, self.corners)


@pytest.mark.full
@pytest.mark.parametrize("runtime", ["torch", pytest.param("openvino", marks=[needs_openvino, pytest.mark.full])])
def test_parts_change_no_probability_beyond_rounding(runtime: Runtime) -> None:
    whole, _ = _Run(runtime, 4096).predict()
    for side in (32, 128, PART_SIDE):
        found, decisions = _Run(runtime, side).predict()
        assert [len(parts) for parts in decisions.segmented] == [-(-h // side) * -(-w // side) for h, w in CORES]
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    # Without what lies around a part, the borders of parts would show.
    narrow = _Run(runtime, 32)
    narrow.predictor._networks._card = narrow.predictor.card.model_copy(update={"margin": 0})
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        torch.testing.assert_close(narrow.predict()[0], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("margin", "rates", "in_parts"), [(64, (1, 2, 4), True), (48, (1, 2, 4), False), (64, (2, 4, 6), False)]
)
def test_a_decoder_that_reads_beyond_its_parts_runs_on_whole_cores(
    margin: int, rates: tuple[int, int, int], in_parts: bool
) -> None:
    card = load_bundle("colon-gland").card
    segmenter = card.segmenter.model_copy(update={"rates": rates})
    card = card.model_copy(update={"margin": margin, "segmenter": segmenter, "familiarity": None})
    networks = Predictor(card, NO_DIGEST, *sharing_networks(), device="cpu")._networks
    assert (len(networks.parts((512, 512))) > 1) == in_parts


def test_the_segmenter_runs_only_on_contested_parts_and_the_result_is_the_same() -> None:
    presences = _Run("torch", 32).predictor
    some = _Run("torch", 32)
    values = torch.cat(
        [
            presences.presence(some.rgb_HWC[place][None], [corner])[0].flatten(0, 1)
            for place, corner in zip(some.places, some.corners, strict=True)
        ]
    )
    thresholds = (0.0, float(values[:, 1].quantile(0.7)))
    results = []
    for skip in (True, False):
        run = _Run("torch", 32, card={"gate_thresholds": thresholds}, skip_by_gate=skip)
        probs, decisions = run.predict()
        results.append((probs, sum(map(len, decisions.segmented))))
    (skipping, few), (running, every) = results
    assert every == sum(h * w // 32**2 for h, w in CORES)
    assert 0 < few < every
    assert all(torch.equal(one, other) for one, other in zip(skipping, running, strict=True))
