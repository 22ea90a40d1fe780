"""What a run will do and need, known before it starts."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from models.bundle import ModelCard
from models.runtimes import BATCH_SIZE
from pipeline.config import SegmentConfig
from pipeline.errors import PlanError
from pipeline.slide.blend import TILE_GROUP
from wsi.box import Box
from wsi.grid import Block, Grid, make_grid
from wsi.resample import STRIP_LV
from wsi.slide import SlideInfo
from wsi.tissue import Tissue

# Measured on CMU-1 (docs/benchmarks/slides.md): Python, torch, the readers and what the
# allocator keeps, and one image's activations per tile pixel.
_PROCESS_BYTES = 1500 << 20
_ACTIVATION_BYTES_PER_PX = 550
_OPENVINO_BYTES = 360 << 20
# A pixel of the map compresses to far less than a byte; a quarter is what noisy maps were seen to take.
_COMPRESSED_SHARE = 0.25


@dataclass(frozen=True)
class Plan:
    """Where the blocks and tiles lie, and what the run needs. Immutable and picklable."""

    grid: Grid
    blocks: tuple[Block, ...]
    """The blocks with tissue."""
    tiles: int
    """Tiles to run, those on block borders counted once for each block."""
    tissue_um2: float
    memory_bytes: int
    disk_bytes: int

    def summary(self) -> dict[str, object]:
        """The plan in plain values, for people and for run.json."""
        return asdict(self.grid) | {
            "blocks": len(self.blocks),
            "tiles": self.tiles,
            "map_size": list(self.grid.size_out),
            "map_mpp": self.grid.mpp_out,
            "tissue_mm2": self.tissue_um2 / 1e6,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


def make_plan(info: SlideInfo, tissue: Tissue, card: ModelCard, config: SegmentConfig) -> Plan:
    """Lay the grid and count what has tissue. Raises ResolutionError where the slide is too coarse for the model."""
    grid = make_grid(
        info,
        model_mpp=card.mpp,
        tile_m=card.tile_size,
        overlap=config.overlap,
        output_stride=config.output_stride,
        block_out=config.block_out,
    )
    counts = {block: len(needed_tiles(grid, block_tissue(grid, tissue, block), block)) for block in grid.blocks()}
    blocks = tuple(block for block, count in counts.items() if count)
    return Plan(
        grid=grid,
        blocks=blocks,
        tiles=sum(counts.values()),
        tissue_um2=tissue.area_um2,
        memory_bytes=_memory_bytes(grid, len(card.classes), len(blocks), config),
        disk_bytes=int(len(blocks) * config.block_out**2 * (len(card.classes) + 1) * 4 / 3 * _COMPRESSED_SHARE),
    )


def needed_tiles(grid: Grid, tissue_HW: NDArray[np.bool_], block: Block) -> list[Box]:
    """The tiles, in model pixels, that hold some of the tissue inside the block; `tissue_HW` is its `block_tissue`."""
    tiles = []
    for tile_m in grid.tiles(block.box_out):
        part = grid.box_out(tile_m).intersect(block.box_out).shift(-block.box_out.x, -block.box_out.y)
        if tissue_HW[part.y : part.bottom, part.x : part.right].any():
            tiles.append(tile_m)
    return tiles


def block_tissue(grid: Grid, tissue: Tissue, block: Block) -> NDArray[np.bool_]:
    """The tissue mask over a block's box, as mask_HW; nothing beyond the map is tissue."""
    tissue_HW = tissue.sample(block.box_out, grid.l0_per_out)
    # The mask's last pixels reach beyond the slide.
    inside = block.box_out.intersect(Box(0, 0, *grid.size_out))
    tissue_HW[inside.height :] = False
    tissue_HW[:, inside.width :] = False
    return tissue_HW


def check_resources(plan: Plan, name: str, output: Path) -> None:
    """Raise PlanError where the plan needs more memory than is available, or more disk than is free under `output`."""
    available = psutil.virtual_memory().available
    if plan.memory_bytes > available:
        raise PlanError(
            f"{name}: needs about {plan.memory_bytes / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
            f"available; lower --num-workers or --batch-size"
        )
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes > free:
        raise PlanError(
            f"{name}: needs about {plan.disk_bytes / 2**20:.0f} MiB on the disk of {output}, {free / 2**20:.0f} MiB "
            f"are free; free some space or choose another --output"
        )


def _memory_bytes(grid: Grid, classes: int, blocks: int, config: SegmentConfig) -> int:
    """Upper bound of the process's memory: it depends on the block, the batch and the workers, not on the slide."""
    side_m = grid.block_out * grid.m_per_out + 2 * grid.tile_m
    canvas = 3 * side_m**2
    strip = 4 * 3 * int(side_m * grid.lv_per_m) * int(STRIP_LV + 2 * grid.lv_per_m)
    group = TILE_GROUP * (3 * grid.tile_m**2 + 4 * classes * (grid.tile_m // grid.m_per_out) ** 2)
    # Sums and weights in float32, their quotient, and the labels' polygons while they are traced.
    blend = 4 * (2 * classes + 4) * grid.block_out**2
    in_flight = min(config.in_flight, max(blocks, 1)) * (canvas + strip + blend)
    network = (config.batch_size or BATCH_SIZE) * grid.tile_m**2 * _ACTIVATION_BYTES_PER_PX
    runtime = _OPENVINO_BYTES if config.chosen_runtime == "openvino" else 0
    return _PROCESS_BYTES + in_flight + group + network + runtime
