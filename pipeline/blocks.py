"""One block: its pixels once through the networks, blended, written, and recorded.

A block knows nothing of the others. Its result depends on the slide, the model and the parameters alone, so it is the
same to the byte in any order, by any process, the first time or after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.errors import NonFiniteOutputError
from models.predictor import Predictor
from pipeline.config import SegmentConfig
from pipeline.errors import PipelineError
from pipeline.plan import TILE_GROUP, block_tissue, needed_tiles
from pipeline.polygons import block_regions, save_regions
from pipeline.store import MapStore
from wsi.grid import Block, Box, Grid
from wsi.resample import read_tiles
from wsi.slide import Slide, SlideInfo
from wsi.tissue import Tissue

BACKGROUND_LABEL = 0
"""Label of glass and of "no class"; class k of the model has the label k + 1."""


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a finished block."""

    index: int
    files: dict[str, str]
    """Path in the working folder -> digest, of all that the block wrote."""
    class_px: list[int]
    """Pixels of the map per label, background first."""
    tiles: int
    segmented: int
    """Tiles that needed the segmenter."""
    unclassified: int
    """Tiles in which the gate silenced every class."""
    bad_tiles_l0: list[list[int]]
    """x, y, width, height in level-0 pixels of the tiles of which some part could not be read."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time per stage."""


@dataclass(frozen=True)
class BlockWork:
    """All that the blocks of one slide have in common. Picklable."""

    info: SlideInfo
    grid: Grid
    tissue: Tissue
    config: SegmentConfig
    store: MapStore
    folder: Path
    """The working folder: `files` of the records are relative to it."""


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """The block was left unfinished because the run is ending."""


class _Timer:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def segment_block(
    work: BlockWork, slide: Slide, predictor: Predictor, block: Block, stopped: Callable[[], bool]
) -> tuple[BlockRecord, list[Path]]:
    """Segment one block and write its chunks and polygons; returns its record, without digests, and the files written.

    `stopped` is asked between groups of tiles. Raises Stopped once it says True, and PipelineError naming the tile
    where a network gives NaN or infinity, or naming the block where the device fails or runs out of memory.
    """
    timer, grid = _Timer(), work.grid
    tissue_HW = block_tissue(grid, work.tissue, block)
    tiles_m = needed_tiles(grid, tissue_HW, block)
    with timer("read"):
        pixels = read_tiles(slide, grid, tiles_m)
    if stopped():
        raise Stopped
    bad_tiles = [t for t in tiles_m if any(_overlap(t, bad) for bad in pixels.unreadable_m)]
    try:
        with timer("copy"):  # before it is this block's turn, so that a GPU goes on with another's
            canvas_HWC = predictor.on_device(pixels.canvas_HWC)
        with timer("wait"):
            predictor.lock.acquire()
        try:
            with timer("network"):
                blend, counts = _predict(work, predictor, block, tiles_m, canvas_HWC, pixels.canvas_m, stopped)
                probs_KHW, labels_HW = blend.result(tissue_HW)
        finally:
            predictor.lock.release()
    except (RuntimeError, MemoryError) as error:
        raise _device_error(work.info, predictor.device, grid.box_l0(pixels.canvas_m), error) from error
    del pixels, canvas_HWC, blend
    with timer("polygons"):
        regions = block_regions(
            labels_HW,
            origin_out=(block.box_out.x, block.box_out.y),
            min_area_px=work.config.min_area_um2 / grid.mpp_out**2,
            tolerance_px=work.config.simplify_px,
        )
        regions_path = regions_file(work.folder, block)
        save_regions(regions_path, regions)
    with timer("write"):
        chunks = work.store.write_block(block.box_out, probs_KHW, labels_HW)
    record = BlockRecord(
        index=block.index,
        files={},
        class_px=np.bincount(labels_HW.ravel(), minlength=len(probs_KHW) + 1).tolist(),
        tiles=len(tiles_m),
        segmented=counts[0],
        unclassified=counts[1],
        bad_tiles_l0=[list(grid.box_l0(t)) for t in bad_tiles],
        seconds=timer.seconds,
    )
    return record, [regions_path, *(work.store.path / chunk for chunk in chunks)]


def regions_file(folder: Path, block: Block) -> Path:
    """Where the polygons of a block are kept until the join."""
    return folder / "regions" / f"{block.index:06d}.arrow"


def chunks_of(work: BlockWork, record: BlockRecord) -> set[Path]:
    """The chunk files that a finished block has, relative to the store."""
    files = (work.folder / name for name in record.files)
    return {file.relative_to(work.store.path) for file in files if file.is_relative_to(work.store.path)}


class Blend:
    """The weighted mean of overlapping tiles over one block, on the network's device.

    Every tile counts with a weight that falls towards its edges, and the sum is divided by the summed weights: weights
    sum to one everywhere, so equal tiles give an equal map, and there are no seams.
    """

    def __init__(self, block: Block, classes: int, tile_out: int, device: torch.device) -> None:
        side = (block.box_out.height, block.box_out.width)
        self._box_out = block.box_out
        self._sums_KHW = torch.zeros((classes, *side), device=device)
        self._weights_HW = torch.zeros(side, device=device)
        # Raised cosine; positive at the outermost pixel, so that no pixel of a tile is without weight.
        ramp = torch.sin(torch.pi * (torch.arange(tile_out, dtype=torch.float64) + 0.5) / tile_out) ** 2
        self._window_hw = torch.outer(ramp, ramp).to(device, torch.float32)

    def add(self, box_out: Box, probs_Khw: torch.Tensor) -> None:
        """Add one tile, whose corner is `box_out`'s; parts outside the block are dropped."""
        inside = box_out.intersect(self._box_out)
        rows, columns = inside.slices(self._box_out)
        tile_rows, tile_columns = inside.slices(box_out)
        window_hw = self._window_hw[tile_rows, tile_columns]
        self._sums_KHW[:, rows, columns] += probs_Khw[:, tile_rows, tile_columns] * window_hw
        self._weights_HW[rows, columns] += window_hw

    def mean(self) -> torch.Tensor:
        """Probabilities as probs_KHW float32; 0 where there was no tile."""
        return self._sums_KHW / self._weights_HW.clamp_min(torch.finfo(torch.float32).tiny)

    def result(self, tissue_HW: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Probabilities (times 255) as probs_KHW and labels_HW; both are 0 outside the tissue."""
        tissue = torch.from_numpy(tissue_HW).to(self._weights_HW.device)
        probs_KHW = self.mean()
        winner_HW = winners(probs_KHW)
        labels_HW = torch.where(tissue & (winner_HW < len(probs_KHW)), winner_HW + 1, BACKGROUND_LABEL)
        # A little above one half: equal probabilities such as 0.5 lie on a rounding edge, where the last bit of the
        # sums would decide.
        scaled_KHW = torch.where(tissue, probs_KHW * 255 + (0.5 + 2**-10), 0)
        return scaled_KHW.to(torch.uint8).cpu().numpy(), labels_HW.to(torch.uint8).cpu().numpy()


def winners(probs_KHW: torch.Tensor) -> torch.Tensor:
    """Index of the most probable class of each pixel, (H, W) int64; K where "no class" is more probable.

    The probability of "no class" is what is missing to a sum of one.
    """
    best_HW, winner_HW = probs_KHW.max(dim=0)
    is_class_HW = (best_HW > 0) & (best_HW >= 1 - probs_KHW.sum(dim=0))
    return torch.where(is_class_HW, winner_HW, len(probs_KHW))


def _predict(
    work: BlockWork,
    predictor: Predictor,
    block: Block,
    tiles_m: list[Box],
    canvas_HWC: torch.Tensor,
    canvas_m: Box,
    stopped: Callable[[], bool],
) -> tuple[Blend, tuple[int, int]]:
    grid = work.grid
    tile_out = grid.tile_m // grid.m_per_out
    blend = Blend(block, len(predictor.card.classes), tile_out, predictor.device)
    segmented = unclassified = 0
    for start in range(0, len(tiles_m), TILE_GROUP):
        if stopped():
            raise Stopped
        group = tiles_m[start : start + TILE_GROUP]
        try:
            prediction = predictor.predict(torch.stack([canvas_HWC[t.slices(canvas_m)] for t in group]))
        except NonFiniteOutputError as error:
            places = ", ".join(str(tuple(grid.box_l0(group[i]))) for i in error.indices[:3])
            raise PipelineError(
                f"{work.info.path.name}: {error}, at level-0 (x, y, width, height) {places}; "
                f"try --precision float32, or another model"
            ) from error
        for tile_m, probs_Khw in zip(group, prediction.probs_NKhw, strict=True):
            blend.add(grid.box_out(tile_m), probs_Khw)
        segmented += int(prediction.segmented_N.sum())
        unclassified += int((~prediction.passed_NK.any(axis=1)).sum())
    return blend, (segmented, unclassified)


def _device_error(info: SlideInfo, device: torch.device, block_l0: Box, error: Exception) -> PipelineError:
    """What to say where the device, not the network, is to blame; torch's own reports take many lines."""
    said = str(error).partition("\n")[0] or "no reason given"
    short = isinstance(error, MemoryError) or "out of memory" in said.lower()
    return PipelineError(
        f"{info.path.name}: {'out of memory' if short else 'a network failed'} on {device} ({said}), in the block at "
        f"level-0 (x, y, width, height) {tuple(block_l0)}; "
        + ("lower --batch-size or --num-workers and " if short else "check the device, or pass --device cpu, and ")
        + "run the same command again, which goes on from the finished blocks"
    )


def _overlap(a: Box, b: Box) -> bool:
    common = a.intersect(b)
    return common.width > 0 and common.height > 0
