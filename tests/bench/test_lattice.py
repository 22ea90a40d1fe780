from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.predictor import Predictor
from pipeline.slide.recipe import segment_slide
from tests.bench.lattice import (
    BESIDE,
    SEGMENT,
    contested_shares,
    edge_profiles,
    excess_steps,
    phase_ratios,
    print_contested,
    print_phase,
    print_steps,
    random_places,
    shifted_labels,
)
from tests.models.networks import ColorSegmenter, ConstantClassifier
from tests.pipeline.fakes import COLORS, SMALL, color_predictor, predictor, region_slide
from wsi.grid import make_grid
from wsi.slide import open_slide
from wsi.tissue import find_tissue


class PlaceSegmenter(nn.Module):
    """Knows colors, and prefers the first class in the left part of every image, like a network with zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.colors = ColorSegmenter(COLORS, sharpness=1.0)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NKhw: Tensor = self.colors(x_NCHW)
        ramp_w = torch.linspace(5, -5, logits_NKhw.shape[3])
        return logits_NKhw + torch.stack([ramp_w, -ramp_w])[:, None]


def changed(path: Path, of: Predictor, pixels: int) -> float:
    """Return the share of the labels inside the tissue that a shift changes."""
    before_HW, inside_HW, computed = shifted_labels(path, of, 256, 0)
    after_HW, also_HW, _ = shifted_labels(path, of, 256, pixels)
    counted_HW = inside_HW[pixels:, pixels:] & also_HW
    assert counted_HW.sum() > 0.5 * 960 * 640
    assert 1.2 < computed < 3
    return float((before_HW[pixels:, pixels:] != after_HW)[counted_HW].mean())


@pytest.mark.full
@pytest.mark.parametrize(("segmenter", "depends"), [(ColorSegmenter(COLORS), False), (PlaceSegmenter(), True)])
def test_an_edge_changes_the_probabilities_of_a_network_that_knows_its_place(
    tmp_path: Path, segmenter: nn.Module, depends: bool
) -> None:
    of = predictor(ConstantClassifier((0.9, 0.9)), segmenter, margin=32)
    with open_slide(region_slide(tmp_path / "slide.svs")) as slide:
        grid = make_grid(slide.info, model_mpp=of.card.mpp, output_stride=4, block_out=1024)
        own_KD, larger_KD = edge_profiles(slide, grid, of, places=3)
    # Cores of 384 px have 12 rings of 16 px on each side.
    assert own_KD.shape == larger_KD.shape == (len(of.card.classes), 12)
    assert (np.abs(own_KD - larger_KD).max() > 0.01) == depends


@pytest.mark.full
def test_a_shift_changes_the_labels_of_a_network_that_knows_its_place(tmp_path: Path) -> None:
    path = region_slide(tmp_path / "slide.svs")
    # Cores start on cells of 32 pixels, so a shift by half a cell moves the canvases over the tissue.
    assert changed(path, color_predictor(output_stride=1), 16) == 0
    assert changed(path, predictor(ConstantClassifier((0.9, 0.9)), PlaceSegmenter(), output_stride=1), 16) > 0.05


@pytest.mark.parametrize(("period", "axis"), [(42, 0), (61, 1)])
def test_the_period_of_a_lattice_stands_out_from_its_neighbors(period: int, axis: int) -> None:
    counted_HW = np.ones((1500, 1200), np.bool_)
    counted_HW[:, :100] = False
    values_HW = np.random.default_rng(0).normal(0, 1, counted_HW.shape)
    before = phase_ratios(values_HW * counted_HW, counted_HW)
    values_HW += 0.3 * np.expand_dims(np.arange(counted_HW.shape[axis]) % period < period // 4, 1 - axis)
    after = phase_ratios(values_HW * counted_HW, counted_HW)
    assert after[period][1] > 2 * before[period][1]
    assert after[period][1] == max(ratio for p, (_, ratio) in after.items() if abs(p - period) < 10)
    # Means of an eighth of the period: they differ by what was added to a quarter of the phases.
    assert after[period][0] == pytest.approx(0.3, abs=0.03)


def test_the_phases_of_a_result_are_read_from_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = region_slide(tmp_path / "slide.svs")
    config = replace(SMALL, block_out=512, num_workers=1)
    folder = segment_slide(path, tmp_path / "out", color_predictor(), config).folder
    assert folder is not None
    print_phase(folder, 2, path)
    # The purple box without its surroundings: 80×64 of 224×144 pixels that lie 8 pixels inside.
    printed = capsys.readouterr().out
    assert f"slide: label 2 has {80 * 64 / (224 * 144):.2%} of the tissue" in printed
    assert "gray values of the slide: period" in printed


def test_random_places_lie_in_the_tissue(tmp_path: Path) -> None:
    with open_slide(region_slide(tmp_path / "slide.svs")) as slide:
        tissue = find_tissue(slide)
        grid = make_grid(slide.info, model_mpp=1.0, output_stride=4, block_out=64)
        places = list(random_places(grid, tissue, 20))
    assert len(set(places)) == 20
    for box_m in places:
        assert (box_m.width, box_m.height) == (448, 448)
        assert box_m.x >= 160 - 8
        assert box_m.y >= 96 - 8
        assert box_m.right <= 1120 + 8
        assert box_m.bottom <= 736 + 8


def test_the_contested_shares_are_those_of_pixels_and_of_the_cells_that_they_reach() -> None:
    first_KHW = torch.zeros((3, 6, 5))
    first_KHW[0] = 1
    # Two contested pixels in one cell of 4 px, and one in the cell at the corner, of which 2×1 px are in the map.
    first_KHW[1, 0, 0] = first_KHW[2, 3, 3] = first_KHW[2, 5, 4] = 1e-30
    second_KHW = torch.zeros((3, 2, 2))
    assert contested_shares([first_KHW, second_KHW], [1, 4, 8]) == [3 / 34, (16 + 2) / 34, 30 / 34]


@pytest.mark.full
def test_contested_pixels_of_a_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = region_slide(tmp_path / "slide.svs")
    print_contested(path, "colorectal-tissue", None, 256)
    printed = capsys.readouterr().out
    assert printed.startswith("slide.svs, colorectal-tissue: ")
    shares = [float(word.rstrip("%")) for word in printed.split() if word.endswith("%")]
    assert shares == sorted(shares)
    assert len(shares) == 5
    assert 0 < shares[0] < shares[1] < 100


def test_a_border_of_cores_that_shows_exceeds_the_steps_beside_it() -> None:
    # Four cores of 32 rows and 40 columns. The tissue itself changes by 0.01 per pixel, and by 0.3 inside a core.
    core_HW = np.repeat(np.repeat(np.array([[0, 1], [2, 3]], np.int32), SEGMENT, axis=0), 40, axis=1)
    probs_HW = np.tile(0.01 * np.arange(80, dtype=np.float32), (2 * SEGMENT, 1))
    probs_HW[:, 60:] += 0.3
    noisy_HW = probs_HW.copy()
    noisy_HW += np.random.default_rng(0).normal(0, 0.01, probs_HW.shape)
    assert np.abs(excess_steps(np.stack([noisy_HW, 1 - noisy_HW]), core_HW)[0]).max() < 0.01
    probs_HW[SEGMENT:, 40:] += 0.1  # the border of the lower cores shows
    excess_S, column_S = excess_steps(np.stack([probs_HW, 1 - probs_HW]), core_HW)
    assert column_S.tolist() == [40, 40]
    assert excess_S.tolist() == pytest.approx([0, 0.1], abs=1e-5)
    # In the transposed map, only half of the border between upper and lower cores shows.
    across_S, column_S = excess_steps(probs_HW.T[None], core_HW.T)
    assert column_S.tolist() == [32, 32]
    assert across_S.tolist() == pytest.approx([0, 0.1 * 24 / 32], abs=1e-5)
    assert np.abs(excess_steps(probs_HW[None], core_HW, BESIDE)[0]).max() < 1e-5
    assert len(excess_steps(probs_HW[None], core_HW, BESIDE)[0]) == 2
    core_HW[: SEGMENT // 2, :40] = -1  # a border needs two cores
    assert len(excess_steps(probs_HW[None], core_HW)[0]) == 1


@pytest.mark.full
def test_the_steps_of_a_slide_are_those_between_its_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = region_slide(tmp_path / "slide.svs")
    of = {
        "colors": color_predictor(),
        "place": predictor(ConstantClassifier((0.9, 0.9)), PlaceSegmenter()),
    }
    monkeypatch.setattr("tests.bench.lattice.make_predictor", lambda model, margin, output_stride: of[model])
    found = {}
    for model in of:
        print_steps(path, model, None, 256)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"slide.svs, {model}: margin ")
        found[model] = [(int(line.split(": ")[1].split()[0]), float(line.split()[-1])) for line in lines[1:]]
    (inside, largest), (between, between_largest), (_, beside) = found["place"]
    assert inside > 10
    assert min(largest, between_largest if between else 1) > 0.3 > beside
    assert [count for count, _ in found["colors"][:2]] == [inside, between]
    assert max(step for _, step in found["colors"]) < 0.01
