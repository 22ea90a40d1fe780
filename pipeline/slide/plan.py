"""The plan of a run: which canvases it computes, and the memory and disk space it needs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.backbone_windows import RING, Place, runs_in_windows, window_places
from models.card import ModelCard
from models.runtimes import CONTEXT, FEATURE_BYTES_PER_PX, RUNTIME_FACTS, STREAMS
from pipeline.config import MapSettings, ResolvedSettings
from pipeline.errors import PlanError
from pipeline.limits import available_memory
from pipeline.results.record import PlanFacts
from pipeline.slide.canvases import CELL_M, canvas_cores, largest_canvas, with_margin
from pipeline.slide.drawn_tissue import edge_margin
from wsi.box import Box
from wsi.grid import Block, Grid, make_grid
from wsi.resample import STRIP_LV
from wsi.slide import Slide, SlideInfo, open_slide, slide_stamp
from wsi.tissue import Tissue, find_tissue
from wsi.tissue_edge import possible_tissue

# Noisy maps compress to a quarter of a byte per pixel; others to less.
_COMPRESSED_SHARE = 0.25

# Side of the parts in which `block_tissue` interpolates the mask. Most parts lie inside or outside the tissue, where
# there is nothing to interpolate. Working in parts takes a third of the time of a whole block.
_PART_OUT = 256


@dataclass(frozen=True)
class Plan:
    """Which blocks and canvases a run computes, and what it needs. Immutable and picklable."""

    grid: Grid
    blocks: tuple[Block, ...]
    """The blocks with tissue."""
    tiles: int
    """Tiles with tissue; a tile on a block border counts once for each block."""
    canvases: int
    computed_px: int
    """Model pixels of all windows in which the backbone runs: see `backbone_windows`."""
    margin: int
    """Model pixels around the core of a canvas."""
    canvas_m: int
    """Largest side of a canvas in model pixels."""
    in_windows: bool
    """See `runs_in_windows`."""
    tissue_um2: float
    """By the tissue mask, before the blocks draw its border."""
    classes: int
    disk_bytes: int

    def memory_bytes(self, settings: ResolvedSettings) -> int:
        """Return an upper bound of the process's memory.

        The bound depends on the block, the batch, the runtime and the workers. It does not grow with the slide.
        """
        grid, facts = self.grid, RUNTIME_FACTS[settings.runtime]
        side_m = grid.block_out * grid.m_per_out + 2 * max(self.margin + RING + CONTEXT, edge_margin(grid))
        pixels = 3 * side_m**2
        strip = 4 * 3 * int(side_m * grid.lv_per_m) * int(STRIP_LV + 2 * grid.lv_per_m)
        # Probabilities in float32, their bytes, and the labels' polygons while they are traced.
        maps = 4 * (2 * self.classes + 4) * grid.block_out**2
        in_flight = min(settings.in_flight, max(len(self.blocks), 1)) * (pixels + strip + maps)
        # A canvas has a core, also if `canvas_m` leaves no room for one.
        canvas_m = max(min(self.canvas_m, -(-side_m // CELL_M) * CELL_M), 2 * self.margin + CELL_M)
        # The softmax under the gates needs three maps at a time, beside the logits of canvases and of their cores.
        softmax = 4 * 5 * self.classes * (canvas_m // grid.m_per_out) ** 2
        softmax *= STREAMS if settings.runtime == "openvino" else 1
        # The gates of all canvases of a block: of the classes, of "no class", and of any class.
        gates = 4 * (self.classes + 2) * grid.block_out**2
        # The features of all canvases of a block, which overlap by their margins.
        features = FEATURE_BYTES_PER_PX * (side_m * canvas_m // (canvas_m - 2 * self.margin)) ** 2
        # The windows of a shared backbone can be larger than canvases.
        per_px = facts.shared_activation_bytes_per_px if self.in_windows else facts.activation_bytes_per_px
        activations = (canvas_m + 2 * RING) ** 2 * per_px
        return facts.process_bytes + in_flight + gates + features + settings.batch_size * (activations + softmax)

    def facts(self, settings: ResolvedSettings) -> PlanFacts:
        """Return what run.json and `--dry-run --json` state about the plan."""
        return PlanFacts(
            grid=self.grid,
            blocks=len(self.blocks),
            tiles=self.tiles,
            canvases=self.canvases,
            computed_px=self.computed_px,
            tissue_mm2=self.tissue_um2 / 1e6,
            memory_bytes=self.memory_bytes(settings),
            disk_bytes=self.disk_bytes,
        )


class PlannedSlide(NamedTuple):
    """An open slide and the plan of its run."""

    stamp: str
    """`slide_stamp` before anything was read."""
    slide: Slide
    tissue: Tissue
    plan: Plan


def plan_slide(path: Path, card: ModelCard, settings: MapSettings) -> PlannedSlide:
    """Open a slide, find its tissue and plan the run. Write nothing. The caller closes the slide.

    Raises SlideError if the slide cannot be used.
    """
    stamp = slide_stamp(path)
    slide = open_slide(path, settings.mpp, settings.backend)
    try:
        tissue = find_tissue(slide, exclude_folds=settings.exclude_folds)
        return PlannedSlide(stamp, slide, tissue, make_plan(slide.info, tissue, card, settings))
    except BaseException:
        slide.close()
        raise


def make_plan(info: SlideInfo, tissue: Tissue, card: ModelCard, settings: MapSettings) -> Plan:
    """Return the plan of a run: its grid, and the blocks with tissue and their canvases.

    Raises ResolutionError if the slide is too coarse for the model.
    """
    grid = make_grid(info, model_mpp=card.mpp, output_stride=settings.output_stride, block_out=settings.block_out)
    tiles, canvases, computed_px = {}, 0, 0
    for block in grid.blocks():
        tissue_HW = block_tissue(grid, tissue, block)
        tiles[block] = len(needed_tiles(grid, tissue_HW, block))
        cores_m = canvas_cores(grid, tissue_HW, block, card, settings.canvas_m)
        canvases += len(cores_m)
        for rows, columns in backbone_windows(cores_m, grid.box_m(block.box_out), card):
            computed_px += (rows.stop - rows.start) * (columns.stop - columns.start)
    blocks = tuple(block for block, count in tiles.items() if count)
    return Plan(
        grid=grid,
        blocks=blocks,
        tiles=sum(tiles.values()),
        canvases=canvases,
        computed_px=computed_px,
        margin=card.margin,
        canvas_m=largest_canvas(card, settings.canvas_m),
        in_windows=runs_in_windows(card.segmenter),
        # The mask's last pixels reach beyond the slide.
        tissue_um2=min(tissue.area_um2, info.bounds_l0.width * info.bounds_l0.height * info.mpp**2),
        classes=len(card.classes),
        disk_bytes=int(len(blocks) * settings.block_out**2 * (len(card.classes) + 1) * 4 / 3 * _COMPRESSED_SHARE),
    )


def backbone_windows(cores_m: Sequence[Box], block_m: Box, card: ModelCard) -> list[Place]:
    """Return the windows in which the backbone runs for the cores of a block, in model pixels of the slide.

    They are the canvases unless the backbone is known to run in windows of its own (`runs_in_windows`).
    """
    slide_m = Box(0, 0, 0, 0)
    places = [with_margin(core_m, card.margin).slices(slide_m) for core_m in cores_m]
    return window_places(places, card.margin, block_m.slices(slide_m)) if runs_in_windows(card.segmenter) else places


def needed_tiles(grid: Grid, tissue_HW: NDArray[np.bool_], block: Block) -> list[Box]:
    """Return the tiles, in model pixels, with tissue inside the block. `tissue_HW` is the block's `block_tissue`."""
    return [tile_m for tile_m in grid.tiles(block.box_out) if tissue_HW[part_of_block(grid, tile_m, block)].any()]


def part_of_block(grid: Grid, tile_m: Box, block: Block) -> tuple[slice, slice]:
    """Return the rows and columns of a block's map that a tile covers."""
    return grid.box_out(tile_m).intersect(block.box_out).slices(block.box_out)


def block_tissue(grid: Grid, tissue: Tissue, block: Block) -> NDArray[np.bool_]:
    """Return the possible tissue of a block's box, as mask_HW. Pixels beyond the map are False.

    It contains the tissue that `fine_tissue` finds when the block's pixels are read.
    """
    box_out, side = block.box_out, _PART_OUT
    tissue_HW = np.empty((box_out.height, box_out.width), np.bool_)
    for y, x in product(range(box_out.y, box_out.bottom, side), range(box_out.x, box_out.right, side)):
        part_out = Box(x, y, side, side).intersect(box_out)
        tissue_HW[part_out.slices(box_out)] = possible_tissue(tissue, part_out, grid.l0_per_out, grid.mpp_out)
    # The last pixels of the tissue mask reach beyond the slide.
    inside = box_out.intersect(Box(0, 0, *grid.size_out))
    tissue_HW[inside.height :] = False
    tissue_HW[:, inside.width :] = False
    return tissue_HW


def check_resources(plan: Plan, settings: ResolvedSettings, name: str, output: Path) -> None:
    """Raise PlanError if the plan needs more memory than is available or more disk space than is free in `output`."""
    memory, available = plan.memory_bytes(settings), available_memory()
    if memory > available:
        raise PlanError(
            f"{name}: needs about {memory / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are available; "
            f"lower --num-workers or --batch-size, or raise the limit of the container or of ulimit -v if one is set"
        )
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes > free:
        raise PlanError(
            f"{name}: needs about {plan.disk_bytes / 2**20:.0f} MiB on the disk of {output} and "
            f"{free / 2**20:.0f} MiB are free; free some space or choose another --output"
        )
