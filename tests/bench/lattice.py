"""Measure whether the lattice of a run shows in its map, for docs/benchmarks/lattice.md.

    python -m tests.bench.lattice shift SLIDE [-m MODEL] [--by 2048 37] [--box X Y WIDTH HEIGHT]
    python -m tests.bench.lattice phase RESULT [--label 1] [--slide SLIDE]
    python -m tests.bench.lattice edge SLIDE [-m MODEL] [--places 1000]
    python -m tests.bench.lattice contested SLIDE [-m MODEL]
    python -m tests.bench.lattice steps SLIDE [-m MODEL] [--margin PIXELS]

`shift` moves the origin of the grid by some model pixels in x and y and compares the labels inside the tissue at every
model pixel. A shift by 2048, half a block, moves all borders of canvases and blocks. A shift by 37 also moves the cells
of the networks' strides and the gate windows.

`phase` folds the share of a label inside the tissue by every period from 20 to 400 map pixels. A lattice makes the
share depend on the phase at its own period and not at the neighboring ones. With `--slide`, the slide's own gray values
are folded too, because a slide has a lattice of its own: the tiles in which its pixels are compressed.

`edge` averages the segmenter's probabilities over random canvases inside the tissue, by the distance from the edge. It
compares them with the mean over the canvas, and with those of the same pixels in larger canvases.

`contested` measures what skipping parts of a canvas could save: the share of the cores in which the gate leaves several
classes, by pixels and by square cells that contain such a pixel.

`steps` looks for borders of cores in the probabilities: segments of a border across which a class changes by more than
it does one map pixel before and after. Lines `BESIDE` pixels beside the borders are measured for comparison.

`lattice_cores.py` computes the cores.

Shape suffixes: K classes, P phases, D distances from the edge, H and W a map, S segments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.bundle import DEFAULT_BUNDLE, load_bundle
from models.predictor import Predictor
from pipeline.config import MapSettings
from pipeline.results.record import read_run
from pipeline.slide.canvases import largest_canvas, with_margin
from pipeline.slide.labels import winners
from pipeline.slide.plan import block_tissue
from pipeline.training.position import RING, ring_means
from tests.bench.lattice_cores import grid_of, make_predictor, predicted_cores
from wsi.box import Box
from wsi.grid import Grid, make_grid
from wsi.resample import read_model_pixels
from wsi.slide import Slide, open_slide
from wsi.tissue import Tissue, find_tissue

INSIDE_OUT = 8
"""Map pixels from the border of the tissue that do not count: the mask itself depends on the grid there."""

PERIODS = range(20, 401)
"""Periods in map pixels."""

NEIGHBORS = 6
"""Periods on either side with which a period is compared. The nearest ones do not count: they share its pattern."""

SIDE = 448
"""Side of the random canvases in model pixels."""

FARTHER = 224
"""Model pixels by which `edge` extends a random canvas for comparison: a multiple of 32, so that the cells of the
networks' strides stay in place."""

CELLS = (32, 64, 128, 256)
"""Sides in model pixels of the cells of `contested`."""

SEGMENT = 32
"""Length of a segment of a border of cores in map pixels."""

BESIDE = 12
"""Map pixels between a border and the segments with which it is compared."""

STEPS = (0.02, 0.04, 0.08, 0.16)
"""`steps` counts the segments that exceed each of these."""

NEAREST = 2 * RING
"""Distance from the edge of a canvas, in model pixels, from which `edge` measures. OpenVINO is traced with the smallest
canvas, and a smaller margin would change the padding."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shift = commands.add_parser("shift")
    edge = commands.add_parser("edge")
    contested = commands.add_parser("contested")
    steps = commands.add_parser("steps")
    for command in (shift, edge, contested, steps):
        command.add_argument("slide", type=Path)
        command.add_argument("-m", "--model", default=DEFAULT_BUNDLE)
        command.add_argument("--margin", type=int, help="model pixels around a core, instead of the model's")
    for command in (shift, contested, steps):
        command.add_argument("--canvas", type=int, help="largest side in model pixels, instead of the model's")
    shift.add_argument("--by", type=int, nargs="+", default=[2048, 37], help="model pixels")
    shift.add_argument("--box", type=int, nargs=4, help="part of the slide in level-0 pixels, instead of all of it")
    edge.add_argument("--places", type=int, default=1000)
    phase = commands.add_parser("phase")
    phase.add_argument("result", type=Path, help="folder of a result, as results/CMU-1")
    phase.add_argument("--label", type=int, default=1)
    phase.add_argument("--slide", type=Path)
    options = vars(parser.parse_args(arguments))
    tables: dict[str, Callable[..., None]] = {
        "shift": print_shift,
        "phase": print_phase,
        "edge": print_edge,
        "contested": print_contested,
        "steps": print_steps,
    }
    tables[options.pop("command")](**options)


def print_shift(
    slide: Path, model: str, margin: int | None, by: Sequence[int], canvas: int | None, box: Sequence[int] | None
) -> None:
    """Print the share of labels that change with each shift."""
    predictor = make_predictor(model, margin, output_stride=1)
    part_l0 = None if box is None else Box(*box)
    expected_HW, inside_HW, computed = shifted_labels(slide, predictor, canvas, 0, part_l0)
    largest = largest_canvas(predictor.card, canvas)
    print(f"{slide.name}, {model}: margin {predictor.card.margin}, canvas {largest}, {computed:.2f} pixels per pixel")
    for pixels in by:
        labels_HW, also_HW, _ = shifted_labels(slide, predictor, canvas, pixels, part_l0)
        counted_HW = inside_HW[pixels:, pixels:] & also_HW
        changed = (expected_HW[pixels:, pixels:] != labels_HW) & counted_HW
        share = changed.sum() / max(1, counted_HW.sum())
        print(f"shifted by {pixels} model px: {share:.3%} of {counted_HW.sum()} labels inside the tissue change")


def shifted_labels(
    path: Path, predictor: Predictor, canvas_m: int | None, pixels: int, part_l0: Box | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], float]:
    """Return the label of each model pixel right of and below `pixels`, (H, W), and which are inside the tissue.

    Label K is "no class". The last value is the number of computed pixels per pixel of tissue. `predictor` has output
    stride 1. Every block is computed as in a run, but nothing is skipped outside its canvases.
    """
    with open_slide(path) as opened, _moved(opened, predictor.card.mpp, pixels, part_l0) as slide:
        grid = grid_of(slide, predictor)
        tissue = find_tissue(slide)
        tissue_HW = np.zeros(grid.size_m[::-1], np.bool_)
        for block in grid.blocks():
            mask_HW, box = block_tissue(grid, tissue, block), block.box_out
            part_HW = tissue_HW[box.y : box.bottom, box.x : box.right]
            part_HW[:] = mask_HW[: part_HW.shape[0], : part_HW.shape[1]]
        labels_HW = np.zeros(grid.size_m[::-1], np.uint8)
        computed = 0
        for core_m, pixels, probs_KHW in predicted_cores(slide, grid, tissue, predictor, canvas_m):
            core_HW = labels_HW[core_m.y : core_m.bottom, core_m.x : core_m.right]
            core_HW[:] = winners(probs_KHW).numpy()[: core_HW.shape[0], : core_HW.shape[1]]
            computed += pixels
    return labels_HW, _inside(tissue_HW, 4 * INSIDE_OUT), computed / max(1, int(tissue_HW.sum()))


def _moved(slide: Slide, mpp: float, pixels: int, part_l0: Box | None) -> Slide:
    """Return a slide or a part of it whose origin, in all frames, lies `pixels` model pixels further inside."""
    grid = make_grid(slide.info, model_mpp=mpp, output_stride=4, block_out=MapSettings().block_out)
    step_l0 = pixels * grid.lv_per_m * grid.l0_per_lv
    if step_l0 != int(step_l0):
        raise SystemExit(f"{slide.info.path.name}: {pixels} model px are {step_l0} level-0 px; choose a whole number")
    by, bounds = int(step_l0), part_l0 or slide.info.bounds_l0
    inner = Box(bounds.x + by, bounds.y + by, bounds.width - by, bounds.height - by)
    return Slide(replace(slide.info, bounds_l0=inner))


def print_phase(result: Path, label: int, slide: Path | None) -> None:
    """Print the periods at which the share of a label depends on the phase more than at the neighboring periods."""
    stored = zarr.open_array(result / f"{result.name}.ome.zarr" / "labels" / "classes" / "0", mode="r")
    labels_HW = np.asarray(stored[:])
    tissue_HW = _inside(labels_HW > 0, INSIDE_OUT)
    chosen_HW = (labels_HW == label) & tissue_HW
    print(f"{result.name}: label {label} has {chosen_HW.sum() / tissue_HW.sum():.2%} of the tissue")
    _print_periods("labels", phase_ratios(chosen_HW.astype(np.float64), tissue_HW))
    if slide is not None:
        run = read_run(result)
        if run is None:
            raise SystemExit(f"{result}: not a result of wsi-segment")
        gray_HW = _gray(slide, run.plan.grid, labels_HW.shape)
        _print_periods("gray values of the slide", phase_ratios(gray_HW * tissue_HW, tissue_HW))


def phase_ratios(values_HW: NDArray[np.float64], counted_HW: NDArray[np.bool_]) -> dict[int, tuple[float, float]]:
    """Return for each period its amplitude and the ratio to the median amplitude of its neighbors.

    The amplitude is the largest difference between the means of two phases, over both axes. Means are taken over an
    eighth of the period, so that amplitudes of different periods are comparable. `values_HW` is 0 where not counted.
    """
    sums = [(values_HW.sum(axis=1 - axis), counted_HW.sum(axis=1 - axis).astype(np.float64)) for axis in (0, 1)]
    amplitude = {period: max(_amplitude(total, count, period) for total, count in sums) for period in PERIODS}
    found = {}
    for period, own in amplitude.items():
        near = [amplitude[p] for p in PERIODS if 1 < abs(p - period) <= NEIGHBORS]
        found[period] = own, own / max(float(np.median(near)), 1e-12)
    return found


def _amplitude(total: NDArray[np.float64], count: NDArray[np.float64], period: int) -> float:
    phase = np.arange(len(total)) % period
    width = max(1, period // 8)
    total_P, count_P = (
        _smoothed(np.bincount(phase, line, period).astype(np.float64), width) for line in (total, count)
    )
    means_P = total_P / np.maximum(count_P, 1)
    return float(means_P.max() - means_P.min())


def _smoothed(sums_P: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the sums over `width` neighboring phases; the last phase is a neighbor of the first one."""
    return np.convolve(np.concatenate([sums_P, sums_P[: width - 1]]), np.ones(width), "valid")


def _print_periods(name: str, ratios: dict[int, tuple[float, float]]) -> None:
    worst = sorted(ratios.items(), key=lambda item: -item[1][1])[:6]
    found = (f"period {period}: {ratio:.2f} times its neighbors ({own:.4f})" for period, (own, ratio) in worst)
    print(f"{name}: {'; '.join(found)}")


def _gray(path: Path, grid: Grid, shape_HW: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the mean of the colors of each map pixel, in an array of the shape of the stored map."""
    (height, width), scale = shape_HW, grid.m_per_out
    gray_HW = np.zeros(shape_HW)
    with open_slide(path) as slide:
        for block in grid.blocks():
            rgb_HWC = read_model_pixels(slide, grid, grid.box_m(block.box_out)).rgb_HWC
            mean_HW = rgb_HWC.mean(axis=2).reshape(block.box_out.height, scale, -1, scale).mean(axis=(1, 3))
            box = block.box_out.intersect(Box(0, 0, width, height))
            gray_HW[box.slices(Box(0, 0, 0, 0))] = mean_HW[: box.height, : box.width]
    return gray_HW


def print_edge(slide: Path, model: str, margin: int | None, places: int) -> None:
    """Print the mean probability of each class by the distance from the edge of a canvas."""
    trusted = load_bundle(model).card.margin if margin is None else margin
    predictor = make_predictor(model, NEAREST, output_stride=4)
    with open_slide(slide) as opened:
        grid = make_grid(opened.info, model_mpp=predictor.card.mpp, output_stride=4, block_out=1024)
        profile_KD, without_KD = edge_profiles(opened, grid, predictor, places)
    print(f"{slide.name}, {model}: {places} canvases of {SIDE} px; trusted from {trusted} px on")
    beyond = slice((trusted - NEAREST) // RING, None)
    for entry, profile_D, without_D in zip(predictor.card.classes, profile_KD, without_KD, strict=True):
        inside_D = profile_D[beyond]
        deviation = np.abs(inside_D / inside_D.mean() - 1).max()
        by_edge = np.abs(inside_D / without_D[beyond] - 1).max()
        rings = ", ".join(f"{NEAREST + RING * i}: {value:.4f}" for i, value in enumerate(profile_D))
        print(
            f"{entry.name}: {rings}; beyond the margin within {deviation:.1%} of its mean {inside_D.mean():.4f}, and "
            f"within {by_edge:.1%} of the same pixels without an edge"
        )


def edge_profiles(
    slide: Slide, grid: Grid, predictor: Predictor, places: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean probabilities (K, D) by distance from the edge of random canvases, from `NEAREST` on.

    The second array has the means of the same pixels in canvases that reach `FARTHER` px beyond these edges. Rings
    contain different tissue, which changes both arrays alike, so their ratio shows what the edge alone does.
    """
    total_KHW: NDArray[np.float64] | float = 0.0
    without_KHW: NDArray[np.float64] | float = 0.0
    first, side = FARTHER // grid.m_per_out, (SIDE - 2 * NEAREST) // grid.m_per_out
    for box_m in random_places(grid, find_tissue(slide), places):
        rgb_HWC = read_model_pixels(slide, grid, with_margin(box_m, FARTHER)).rgb_HWC
        inner_HWC = rgb_HWC[FARTHER:-FARTHER, FARTHER:-FARTHER]
        own_KHW, larger_KHW = (
            predictor.logits(one_HWC[None])[0].softmax(dim=0).double().numpy() for one_HWC in (inner_HWC, rgb_HWC)
        )
        total_KHW = total_KHW + own_KHW
        without_KHW = without_KHW + larger_KHW[:, first : first + side, first : first + side]
    profiles = [ring_means(np.asarray(one) / places, RING // grid.m_per_out) for one in (total_KHW, without_KHW)]
    return profiles[0], profiles[1]


def print_contested(slide: Path, model: str, margin: int | None, canvas: int | None) -> None:
    """Print the shares of the cores in which the gate leaves several classes."""
    predictor = make_predictor(model, margin, output_stride=4)
    with open_slide(slide) as opened:
        grid = grid_of(opened, predictor)
        found = predicted_cores(opened, grid, find_tissue(opened), predictor, canvas)
        shares = contested_shares((probs_KHW for _, _, probs_KHW in found), [1, *(side // 4 for side in CELLS)])
    pixels, *cells = (f"{share:.2%}" for share in shares)
    by_cell = ", ".join(f"{share} ({side} px)" for side, share in zip(CELLS, cells, strict=True))
    print(f"{slide.name}, {model}: {pixels} of the cores' pixels are contested; cells with one cover {by_cell}")


def contested_shares(maps: Iterable[Tensor], sides: Sequence[int]) -> list[float]:
    """Return for each side the share of the maps' area in square cells with a contested pixel.

    `maps` are gated probabilities (K, H, W). The gate makes the probability of a removed class exactly 0, so a pixel is
    contested if several probabilities are above 0. Cells start at the top left corner of each map.
    """
    reached, area = dict.fromkeys(sides, 0), 0
    for probs_KHW in maps:
        contested_HW = ((probs_KHW > 0).sum(dim=0) > 1).numpy()
        area += contested_HW.size
        for side in sides:
            rows_R, columns_C = (np.arange(0, length, side) for length in contested_HW.shape)
            cells_RC = np.logical_or.reduceat(np.logical_or.reduceat(contested_HW, rows_R), columns_C, axis=1)
            heights_R, widths_C = (
                np.diff(starts, append=length)
                for starts, length in zip((rows_R, columns_C), contested_HW.shape, strict=True)
            )
            reached[side] += int((np.outer(heights_R, widths_C) * cells_RC).sum())
    return [reached[side] / max(1, area) for side in sides]


def print_steps(slide: Path, model: str, margin: int | None, canvas: int | None) -> None:
    """Print how many segments of the borders between cores show in the probabilities."""
    predictor = make_predictor(model, margin, output_stride=4)
    with open_slide(slide) as opened:
        grid = grid_of(opened, predictor)
        probs_KHW, core_HW = joined_cores(grid, predicted_cores(opened, grid, find_tissue(opened), predictor, canvas))
    print(f"{slide.name}, {model}: margin {predictor.card.margin}, canvas {largest_canvas(predictor.card, canvas)}")
    maps = ((probs_KHW, core_HW), (probs_KHW.swapaxes(1, 2), core_HW.T))
    found = [np.concatenate(parts) for parts in zip(*(excess_steps(*one) for one in maps), strict=True)]
    (excess_S, column_S), block_out = found, grid.block_out
    beside_S = np.concatenate([excess_steps(*one, BESIDE)[0] for one in maps])
    for name, part_S in (
        ("inside blocks", excess_S[column_S % block_out != 0]),
        ("between blocks", excess_S[column_S % block_out == 0]),
        (f"{BESIDE} map px beside borders", beside_S),
    ):
        shares = ", ".join(f"{int((part_S > step).sum())} above {step}" for step in STEPS)
        print(f"{name}: {len(part_S)} segments of {SEGMENT} map px, {shares}, largest {part_S.max(initial=0):.3f}")


def joined_cores(grid: Grid, found: Iterable[tuple[Box, int, Tensor]]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the probabilities (K, H, W) of the whole map, and the number of each pixel's core (H, W), -1 for none."""
    stride, (width, height) = grid.m_per_out, grid.size_m
    core_HW = np.full((-(-height // stride), -(-width // stride)), -1, np.int32)
    probs_KHW = np.zeros((0, *core_HW.shape), np.float32)
    for number, (core_m, _, core_KHW) in enumerate(found):
        if not len(probs_KHW):
            probs_KHW = np.zeros((len(core_KHW), *core_HW.shape), np.float32)
        rows, columns = (
            slice(core_m.y // stride, core_m.bottom // stride),
            slice(core_m.x // stride, core_m.right // stride),
        )
        part_HW = core_HW[rows, columns]
        part_HW[:] = number
        probs_KHW[:, rows, columns] = core_KHW[:, : part_HW.shape[0], : part_HW.shape[1]].numpy()
    return probs_KHW, core_HW


def excess_steps(
    probs_KHW: NDArray[np.float32], core_HW: NDArray[np.int32], beside: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return by how much the step across each segment exceeds the larger of the steps before and after it, (S,).

    Segments are pieces of `SEGMENT` rows of the vertical borders between two cores, or of the lines that lie
    `beside` pixels right of them and inside a core. The step of a class is its mean difference between the two
    sides, so noise of single pixels cancels. The largest excess of all classes counts. The second array has the
    column after each segment, (S,).
    """
    rows = core_HW.shape[0] // SEGMENT * SEGMENT
    core_HW = core_HW[:rows]
    left_HW, right_HW = core_HW[:, :-1], core_HW[:, 1:]
    border_HW = (left_HW != right_HW) & (left_HW >= 0) & (right_HW >= 0)
    if beside:
        border_HW = np.pad(border_HW, ((0, 0), (beside, 0)))[:, : border_HW.shape[1]]
    steps_KHW = np.diff(probs_KHW[:, :rows], axis=2)
    # Before, at and after the border: four pixels in two cores, or in one.
    known_HW = (core_HW[:, :-3] >= 0) & (core_HW[:, 3:] >= 0) & border_HW[:, 1:-1]
    known_HW &= core_HW[:, :-3] == core_HW[:, 1:-2]
    known_HW &= core_HW[:, 2:-1] == core_HW[:, 3:]
    known_HW &= (core_HW[:, 1:-2] == core_HW[:, 2:-1]) == bool(beside)
    whole_SW = known_HW.reshape(-1, SEGMENT, known_HW.shape[1]).all(axis=1)
    mean_KSW = np.abs(steps_KHW.reshape(len(steps_KHW), -1, SEGMENT, steps_KHW.shape[2]).mean(axis=2))
    excess_KSW = mean_KSW[:, :, 1:-1] - np.maximum(mean_KSW[:, :, :-2], mean_KSW[:, :, 2:])
    return np.asarray(excess_KSW.max(axis=0)[whole_SW], np.float32), np.nonzero(whole_SW)[1] + 2


def random_places(grid: Grid, tissue: Tissue, count: int) -> Iterator[Box]:
    """Yield boxes of `SIDE` model pixels, all of tissue, at random places of the slide."""
    rng = np.random.default_rng(0)
    width, height = grid.size_m
    if not tissue.mask_HW.any():
        raise SystemExit("the slide has no tissue")
    while count:
        box_m = Box(int(rng.integers(width - SIDE)), int(rng.integers(height - SIDE)), SIDE, SIDE)
        outer_out = Box(box_m.x // 4, box_m.y // 4, SIDE // 4 + 1, SIDE // 4 + 1)
        if tissue.sample(outer_out, grid.l0_per_out).all():
            count -= 1
            yield box_m


def _inside(tissue_HW: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Return the pixels that are farther than `pixels` (along the axes) from the border of the tissue."""
    return np.asarray(ndimage.minimum_filter(tissue_HW, 2 * pixels + 1, mode="constant", cval=False), np.bool_)


if __name__ == "__main__":
    main()
