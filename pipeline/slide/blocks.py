"""Segment one block: read its pixels, predict its canvases, write and record the result.

A block does not depend on other blocks. Its result depends only on the slide, the model and the parameters. So it has
the same bytes in any order and any process, in a first run or after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.backbone_windows import RING
from models.card import ModelCard
from models.errors import NonFiniteOutputError, reason_of
from models.predictor import Predictor
from models.runtimes import CONTEXT
from pipeline.config import ResolvedSettings
from pipeline.errors import SHORTAGE_HELP, InferenceError
from pipeline.formats.ome_zarr import MapStore
from pipeline.formats.polygons import block_regions
from pipeline.formats.region_files import save_regions
from pipeline.slide.canvases import canvas_cores, with_margin
from pipeline.slide.drawn_tissue import area_px, drawn_tissue, edge_margin
from pipeline.slide.familiarity import CellDistances, save_values, values_file
from pipeline.slide.labels import stored_map
from pipeline.slide.plan import block_tissue, needed_tiles, part_of_block
from wsi.box import Box
from wsi.errors import shortage
from wsi.grid import Block, Grid, whole_pixels_m
from wsi.mirror import mirror_outside, with_sources
from wsi.resample import read_tiles
from wsi.slide import Slide, SlideInfo
from wsi.tissue import Tissue


@dataclass(frozen=True)
class BlockRecord:
    """The facts about a finished block."""

    index: int
    files: dict[str, str]
    """Path in the working folder -> digest, for every file that the block wrote."""
    class_px: list[int]
    """Map pixels per label, background first."""
    tissue_area_px: float
    """Area of the tissue inside the slide in map pixels, without classes with the role "background"."""
    tiles: int
    """Tiles with tissue."""
    segmented: int
    """Tiles on which the segmenter ran."""
    unclassified: int
    """Tiles in whose tissue the gate rejected every class."""
    bad_tiles_l0: list[list[int]]
    """x, y, width and height of the tiles with unreadable parts, in level-0 pixels of the slide's file."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per stage."""
    tissue_px: int = 0
    """Map pixels of tissue whose familiarity is known."""
    unfamiliar_px: int = 0
    """Those of them that are unlike the model's training data."""
    unreadable: bool = False
    """Whether some pixels of the block's tiles, or of the margins around them, could not be read."""


@dataclass(frozen=True)
class BlockWork:
    """Everything that the blocks of one slide share. Picklable."""

    info: SlideInfo
    grid: Grid
    tissue: Tissue
    settings: ResolvedSettings
    store: MapStore
    folder: Path
    """The working folder, to which `BlockRecord.files` are relative."""


class Stopped(Exception):  # noqa: N818 - not an error, but a request
    """The block was abandoned because the run is ending."""


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
    """Segment one block and write its chunks and polygons. Return its record, without digests, and the written files.

    `stopped` is called between canvases. Raises Stopped if it returns True. Raises InferenceError with the canvas's
    place if a network returns NaN or infinity, and with the block's place if the device fails or runs out of memory.
    """
    timer, grid = _Timer(), work.grid
    possible_HW = block_tissue(grid, work.tissue, block)
    tiles_m = needed_tiles(grid, possible_HW, block)
    cores_m = canvas_cores(grid, possible_HW, block, predictor.card, work.settings.canvas_m)
    margin = max(predictor.card.margin + RING + CONTEXT, edge_margin(grid))
    inside_m = whole_pixels_m(work.info, grid)
    boxes_m = [with_sources(with_margin(core_m, margin), inside_m, grid.m_per_out) for core_m in cores_m]
    with timer("read"):
        pixels = read_tiles(slide, grid, boxes_m)
    if stopped():
        raise Stopped
    with timer("tissue"):
        tissue_HW = drawn_tissue(grid, work.tissue, block, pixels)
        # For the networks, which were trained on images with mirrored edges: white around tissue that ends at the edge
        # of the slide would count as unfamiliar.
        mirror_outside(pixels.canvas_HWC, pixels.canvas_m, inside_m)
    unreadable = bool(pixels.unreadable_m)
    bad_tiles = [t for t in tiles_m if any(_overlap(t, bad) for bad in pixels.unreadable_m)]
    try:
        with timer("copy"):  # before this block takes the lock, so that a GPU can compute another block meanwhile
            rgb_HWC = predictor.on_device(pixels.canvas_HWC)
        with timer("wait"):
            predictor.lock.acquire()
        try:
            with timer("network"), predictor.own_threads():
                cells = CellDistances(block.box_out)
                found_KHW, segmented_m = _predict(
                    work, predictor, block, cores_m, rgb_HWC, pixels.canvas_m, cells, stopped
                )
                probs_KHW, labels_HW, has_class_HW = stored_map(found_KHW, tissue_HW)
        finally:
            predictor.lock.release()
    except (RuntimeError, MemoryError) as error:
        raise _device_error(work.info, predictor, grid.box_l0(pixels.canvas_m), error) from error
    del pixels, rgb_HWC, found_KHW
    with timer("polygons"):
        regions_path = save_block_regions(work, block, labels_HW)
    with timer("write"):
        chunks = work.store.write_block(block.box_out, probs_KHW, labels_HW)
        values_hw, tissue_px, unfamiliar_px = cells.values(tissue_HW)
        save_values(values_file(work.folder, block), values_hw)
    record = BlockRecord(
        index=block.index,
        files={},
        class_px=np.bincount(labels_HW.ravel(), minlength=len(probs_KHW) + 1).tolist(),
        tissue_area_px=_tissue_area_px(work, block, predictor.card, labels_HW, tissue_HW),
        tiles=len(tiles_m),
        segmented=sum(any(_overlap(t, core_m) for core_m in segmented_m) for t in tiles_m),
        unclassified=_without_class(grid, block, tiles_m, tissue_HW, has_class_HW),
        bad_tiles_l0=[list(grid.box_l0(t)) for t in bad_tiles],
        seconds=timer.seconds,
        tissue_px=tissue_px,
        unfamiliar_px=unfamiliar_px,
        unreadable=unreadable,
    )
    files = [regions_path, values_file(work.folder, block), *(work.store.path / chunk for chunk in chunks)]
    return record, files


def save_block_regions(work: BlockWork, block: Block, labels_HW: NDArray[np.uint8]) -> Path:
    """Write the polygons of a block's labels. Return their file."""
    regions = block_regions(
        labels_HW,
        origin_out=(block.box_out.x, block.box_out.y),
        min_area_px=work.settings.min_area_um2 / work.grid.mpp_out**2,
        tolerance_px=work.settings.simplify_px,
    )
    path = regions_file(work.folder, block)
    path.parent.mkdir(exist_ok=True)
    save_regions(path, regions)
    return path


def regions_file(folder: Path, block: Block) -> Path:
    """Return the file that keeps the polygons of a block until the polygons of all blocks are joined."""
    return folder / "regions" / f"{block.index:06d}.arrow"


def chunks_of(work: BlockWork, record: BlockRecord) -> dict[Path, str]:
    """Return the digest of each chunk file of a finished block, by its path in the store."""
    store = work.store.path.relative_to(work.folder)
    files = {Path(name): digest for name, digest in record.files.items()}
    return {file.relative_to(store): digest for file, digest in files.items() if file.is_relative_to(store)}


def _predict(
    work: BlockWork,
    predictor: Predictor,
    block: Block,
    cores_m: list[Box],
    rgb_HWC: torch.Tensor,
    rgb_m: Box,
    cells: CellDistances,
    stopped: Callable[[], bool],
) -> tuple[torch.Tensor, list[Box]]:
    """Return the probabilities of the block as found_KHW, and the parts of cores on which the segmenter ran.

    `rgb_HWC` holds the pixels of `rgb_m`, in which all canvases lie.
    """
    grid, margin, box_out = work.grid, predictor.card.margin, block.box_out
    shape = (len(predictor.card.classes), box_out.height, box_out.width)
    found_KHW = torch.zeros(shape, device=predictor.device)
    canvases_m = [with_margin(core_m, margin) for core_m in cores_m]

    def end_if_stopped() -> None:
        if stopped():
            raise Stopped

    try:
        segmented, distances = predictor.predict_into(
            [found_KHW[:, *grid.box_out(core_m).slices(box_out)] for core_m in cores_m],
            rgb_HWC,
            [canvas_m.slices(rgb_m) for canvas_m in canvases_m],
            [(core_m.x, core_m.y) for core_m in cores_m],
            end_if_stopped,
            block=grid.box_m(box_out).slices(rgb_m),
        )
    except NonFiniteOutputError as error:
        places = ", ".join(str(tuple(grid.box_l0(cores_m[i]))) for i in error.indices[:3])
        raise InferenceError(
            f"{work.info.path.name}: {error}, at level-0 (x, y, width, height) {places}; "
            f"try --precision float32, or another model"
        ) from error
    if distances is not None:
        for canvas_m, distances_rc in zip(canvases_m, distances, strict=True):
            cells.add_windows(canvas_m, distances_rc, grid.m_per_out)
    segmented_m = [
        Box(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start).shift(core_m.x, core_m.y)
        for core_m, parts in zip(cores_m, segmented, strict=True)
        for rows, columns in parts
    ]
    return found_KHW, segmented_m


def _tissue_area_px(
    work: BlockWork, block: Block, card: ModelCard, labels_HW: NDArray[np.uint8], tissue_HW: NDArray[np.bool_]
) -> float:
    background = [label for label, one in enumerate(card.classes, start=1) if one.role == "background"]
    bounds_l0, l0_per_out = work.info.bounds_l0, work.grid.l0_per_out
    size_out = (bounds_l0.width / l0_per_out, bounds_l0.height / l0_per_out)
    return area_px(tissue_HW & ~np.isin(labels_HW, background), block.box_out, size_out)


def _without_class(
    grid: Grid, block: Block, tiles_m: Sequence[Box], tissue_HW: NDArray[np.bool_], has_class_HW: NDArray[np.bool_]
) -> int:
    """Return the number of tiles with tissue in which no class has a probability above 0."""
    parts = [part_of_block(grid, tile_m, block) for tile_m in tiles_m]
    return sum(bool(tissue_HW[part].any() and not has_class_HW[part].any()) for part in parts)


def _device_error(info: SlideInfo, predictor: Predictor, block_l0: Box, error: Exception) -> InferenceError:
    """Return the error of a block whose networks failed."""
    what, advice = shortage(error), "check the device, or pass --device cpu"
    if what is not None:
        advice = SHORTAGE_HELP[what]
    elif predictor.device.type == "cpu":
        advice = "pass -vv for details" if predictor.runtime == "torch" else "pass --runtime torch, or -vv for details"
    return InferenceError(
        f"{info.path.name}: {'a network failed' if what is None else what} on {predictor.device} "
        f"({reason_of(error)}), in the block at level-0 (x, y, width, height) {tuple(block_l0)}; {advice}, and run the "
        f"same command again; it resumes after the finished blocks"
    )


def _overlap(a: Box, b: Box) -> bool:
    common = a.intersect(b)
    return common.width > 0 and common.height > 0
