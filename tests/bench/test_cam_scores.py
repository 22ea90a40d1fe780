from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bench.cam_scores import (
    average_drop,
    deletion,
    glass_white,
    increase,
    insertion,
    masked_scores,
    pointing_energy,
    unit_maps,
)

WHITE_C = torch.tensor([2.0, 1.0, 3.0])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def score(x_NCHW: Tensor) -> Tensor:
    """Two classes: how much the image's halves differ from white, through a sigmoid that bends."""
    away_NHW = (x_NCHW - WHITE_C[None, :, None, None]).abs().mean(dim=1)
    left, right = away_NHW[:, :, : away_NHW.shape[2] // 2], away_NHW[:, :, away_NHW.shape[2] // 2 :]
    return torch.stack(
        [left.mean(dim=(1, 2)) - right.square().mean(dim=(1, 2)), right.mean(dim=(1, 2))], dim=1
    ).sigmoid()


def pairs(generator: torch.Generator, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x_BCHW = torch.randn(count, 3, 6, 8, generator=generator)
    map_BHW = torch.rand(count, 6, 8, generator=generator)
    return x_BCHW, map_BHW, torch.randint(0, 2, (count,), generator=generator)


def test_white_glass_is_one_after_undoing_the_normalization() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    white_C = glass_white(mean, std)
    assert [float(white_C[c]) * std[c] + mean[c] for c in range(3)] == pytest.approx([1.0, 1.0, 1.0])


def test_unit_maps_run_from_0_to_1_for_each_image_and_class() -> None:
    maps = torch.tensor([[[[-3.0, 0.0], [1.0, 3.0]], [[2.0, 4.0], [4.0, 6.0]]]])
    units = unit_maps(maps, (2, 2))
    assert units[0, 0].flatten().tolist() == pytest.approx([0.0, 0.5, 2 / 3, 1.0])
    assert units[0, 1].flatten().tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0])


@pytest.mark.parametrize("value", [-1.0, 0.0, 2.5])
def test_flat_map_becomes_zero(value: float) -> None:
    assert (unit_maps(torch.full((1, 2, 3, 3), value), (7, 5)) == 0).all()


def test_full_map_shows_the_whole_image_and_empty_map_glass(generator: torch.Generator) -> None:
    x_BCHW, map_BHW, class_B = pairs(generator)
    whole_B, seen_B = masked_scores(score, x_BCHW, torch.ones_like(map_BHW), class_B, WHITE_C)
    torch.testing.assert_close(seen_B, whole_B)
    _, hidden_B = masked_scores(score, x_BCHW, torch.zeros_like(map_BHW), class_B, WHITE_C)
    # An image that is white everywhere scores sigmoid(0) in both classes.
    assert hidden_B.tolist() == pytest.approx([0.5] * len(class_B))


def test_drop_and_increase_are_those_of_a_loop(generator: torch.Generator) -> None:
    x_BCHW, map_BHW, class_B = pairs(generator, 9)
    drops, rises = [], 0
    for x_CHW, map_HW, k in zip(x_BCHW.numpy(), map_BHW.numpy(), class_B.tolist(), strict=True):
        seen = np.empty_like(x_CHW)
        for c, y, x in np.ndindex(*x_CHW.shape):
            seen[c, y, x] = map_HW[y, x] * x_CHW[c, y, x] + (1 - map_HW[y, x]) * float(WHITE_C[c])
        before = float(score(torch.from_numpy(x_CHW)[None])[0, k])
        after = float(score(torch.from_numpy(seen)[None])[0, k])
        drops.append(max(0.0, before - after) / before)
        rises += after > before
    assert 0 < rises < 9
    for chunk in (2, 32):
        whole_B, seen_B = masked_scores(score, x_BCHW, map_BHW, class_B, WHITE_C, chunk=chunk)
        assert average_drop(whole_B, seen_B) == pytest.approx(np.mean(drops), rel=1e-4)
        assert increase(whole_B, seen_B) == pytest.approx(rises / 9)


def test_drop_of_a_score_of_zero_is_zero() -> None:
    assert average_drop(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.25])) == pytest.approx(0.25)
    assert increase(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.6])) == 0.5


@pytest.mark.parametrize(("steps", "chunk"), [(48, 2), (5, 32)])
@pytest.mark.parametrize("kind", ["deletion", "insertion"])
def test_insertion_and_deletion_are_those_of_a_loop(
    generator: torch.Generator, kind: str, steps: int, chunk: int
) -> None:
    x_BCHW, map_BHW, class_B = pairs(generator)
    function = {"deletion": deletion, "insertion": insertion}[kind]
    areas_B = function(score, x_BCHW, map_BHW, class_B, WHITE_C, steps=steps, chunk=chunk)
    white_CHW = WHITE_C[:, None, None].expand(3, 6, 8)
    for n in range(len(class_B)):
        start, end = (x_BCHW[n], white_CHW) if kind == "deletion" else (white_CHW, x_BCHW[n])
        places = sorted(np.ndindex(6, 8), key=lambda place: -float(map_BHW[n][place]))
        curve = []
        for step in range(steps + 1):
            image = start.clone()
            for y, x in places[: round(step * 48 / steps)]:
                image[:, y, x] = end[:, y, x]
            curve.append(float(score(image[None])[0, class_B[n]]))
        expected = sum((one + other) / 2 / steps for one, other in itertools.pairwise(curve))
        assert float(areas_B[n]) == pytest.approx(expected, rel=1e-4)


def test_a_map_that_follows_the_score_is_inserted_better_than_its_reverse(generator: torch.Generator) -> None:
    x_BCHW = torch.randn(4, 3, 6, 8, generator=generator)
    good_BHW = torch.linspace(0, 1, 8).expand(4, 6, 8)
    class_B = torch.ones(4, dtype=torch.int64)
    assert (
        insertion(score, x_BCHW, good_BHW, class_B, WHITE_C) > insertion(score, x_BCHW, -good_BHW, class_B, WHITE_C)
    ).all()
    assert (
        deletion(score, x_BCHW, good_BHW, class_B, WHITE_C) < deletion(score, x_BCHW, -good_BHW, class_B, WHITE_C)
    ).all()


def test_order_of_pixels_alone_counts_for_deletion(generator: torch.Generator) -> None:
    x_BCHW, map_BHW, class_B = pairs(generator)
    torch.testing.assert_close(
        deletion(score, x_BCHW, map_BHW, class_B, WHITE_C),
        deletion(score, x_BCHW, 7 * map_BHW.exp() - 20, class_B, WHITE_C),
    )


def test_no_steps_are_refused(generator: torch.Generator) -> None:
    x_BCHW, map_BHW, class_B = pairs(generator)
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        deletion(score, x_BCHW, map_BHW, class_B, WHITE_C, steps=0)


def test_energy_is_the_share_of_the_map_inside_the_mask() -> None:
    unit_BHW = torch.tensor([[[1.0, 0.5], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    truth_BHW = torch.tensor(
        [[[True, False], [True, False]], [[True, True], [True, True]], [[True, False], [True, True]]]
    )
    assert pointing_energy(unit_BHW, truth_BHW).tolist() == pytest.approx([1.25 / 2, 0.0, 0.0])


def test_energy_of_a_uniform_map_is_the_share_of_the_mask() -> None:
    truth_BHW = torch.zeros(1, 4, 5, dtype=torch.bool)
    truth_BHW[0, :, :2] = True
    assert float(pointing_energy(torch.ones(1, 4, 5), truth_BHW)) == pytest.approx(0.4)
