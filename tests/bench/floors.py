"""The two times that no run can beat: reading its pixels, and putting its tiles through the networks.

Both are measured with the run's own slide, workers, device and precision, with nothing else around them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.predictor import Predictor
from pipeline.slide.canvases import canvas_cores, with_margin
from pipeline.slide.plan import Plan, block_tissue, needed_tiles
from wsi.box import Box
from wsi.readers import READERS, BackendName, Reader
from wsi.resample import read_tiles
from wsi.slide import BACKGROUND, Pixels, Slide, SlideInfo
from wsi.tissue import Tissue

CELL_LV = 256
"""Cells of the level by which pixels that are read more than once are told from those that are read once."""

SAMPLE_TILES = 128
"""Real tiles that are held in memory for the networks."""

MOST_TILES = 1024
"""Tiles that one measurement of a network takes; the time of more is in proportion."""

SEARCH_TILES = 32
"""Tiles that each batch size is tried with on a CPU; elsewhere three batches."""

BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (16, 32, 64, 128, 256), "xpu": (16, 32, 64, 128, 256), "mps": (4, 8, 16, 32)}
"""Batch sizes that are tried, by the device's type; the run's own is tried as well."""


class Took(NamedTuple):
    """Time of this process."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Reads:
    """What a run reads of its slide."""

    level: int
    strips_lv: tuple[tuple[Box, ...], ...]
    """Per block, the boxes that it reads, cut at the level's edges."""
    distinct_share: float
    """Of the pixels read, those that no other block reads as well, counted in cells."""

    @property
    def pixels(self) -> int:
        """Pixels of the level, those that two blocks read counted twice."""
        return sum(box.width * box.height for strips in self.strips_lv for box in strips)


class NetworkFloor(NamedTuple):
    """Seconds per tile of `Grid.tile_m` model pixels of each network at its best batch size."""

    classifier: Took
    segmenter: Took


class _Listener(Slide):
    """A slide of glass that remembers which boxes it was asked for."""

    def __init__(self, info: SlideInfo) -> None:
        super().__init__(info)
        self.boxes_lv: list[Box] = []

    def read(self, level: int, box_lv: Box) -> Pixels:
        self.boxes_lv.append(box_lv.intersect(Box(0, 0, *self.info.level_sizes[level])))
        return Pixels(np.full((box_lv.height, box_lv.width, 3), BACKGROUND, np.uint8), ())


def planned_reads(info: SlideInfo, tissue: Tissue, plan: Plan, card: ModelCard, canvas_m: int | None) -> Reads:
    """The boxes that the run's blocks read: the engine's own code is asked, nothing is decoded."""
    strips = []
    for block in plan.blocks:
        listener = _Listener(info)
        cores_m = canvas_cores(plan.grid, block_tissue(plan.grid, tissue, block), block, card, canvas_m)
        read_tiles(listener, plan.grid, [with_margin(core_m, plan.margin) for core_m in cores_m])
        strips.append(tuple(box for box in listener.boxes_lv if box.width and box.height))
    width, height = info.level_sizes[plan.grid.level]
    times_HW = np.zeros((-(-height // CELL_LV), -(-width // CELL_LV)), np.int64)
    for block_strips in strips:
        seen_HW = np.zeros_like(times_HW, dtype=bool)
        for box in block_strips:
            rows = slice(box.y // CELL_LV, -(-box.bottom // CELL_LV))
            seen_HW[rows, box.x // CELL_LV : -(-box.right // CELL_LV)] = True
        times_HW += seen_HW
    return Reads(plan.grid.level, tuple(strips), float((times_HW > 0).sum() / max(1, times_HW.sum())))


def decode(info: SlideInfo, reads: Reads, backend: BackendName, workers: int) -> Took:
    """Read and decode all boxes once, a block at a time per worker; the pixels are thrown away."""
    local = threading.local()
    readers: list[Reader] = []

    def read_block(strips_lv: Sequence[Box]) -> None:
        if not hasattr(local, "reader"):
            local.reader = READERS[backend](info.path)
            readers.append(local.reader)
        for box_lv in strips_lv:
            local.reader.read(reads.level, box_lv)

    def read_all() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(read_block, reads.strips_lv))

    took = timed(read_all)
    for reader in readers:
        reader.close()
    return took


def readable_backends(info: SlideInfo, level: int) -> list[BackendName]:
    """The readers that open this slide with the same level sizes and decode it: the run's own first."""
    names: list[BackendName] = [info.backend]
    for name, open_reader in READERS.items():
        if name == info.backend:
            continue
        try:
            with closing(open_reader(info.path)) as reader:
                reader.read(level, Box(0, 0, 1, 1))
                same = [tuple(size) for size in reader.level_sizes] == [tuple(size) for size in info.level_sizes]
        except Exception as error:  # noqa: BLE001 - each library has its own errors; the floor is of those that can
            print(f"{name} does not read this slide: {error}")
            continue
        if same:
            names.append(name)
    return names


def sample_tiles(slide: Slide, tissue: Tissue, plan: Plan, count: int = SAMPLE_TILES) -> NDArray[np.uint8]:
    """Some of the run's tiles as rgb_NHWC, from blocks spread evenly over the slide."""
    step = max(1, len(plan.blocks) // 16)
    chosen = plan.blocks[::step]
    tiles_HWC: list[NDArray[np.uint8]] = []
    for block in chosen:
        tiles_m = needed_tiles(plan.grid, block_tissue(plan.grid, tissue, block), block)
        tiles_m = tiles_m[len(tiles_m) // 2 :][: -(-count // len(chosen))]
        pixels = read_tiles(slide, plan.grid, tiles_m)
        tiles_HWC += [pixels.canvas_HWC[tile_m.slices(pixels.canvas_m)].copy() for tile_m in tiles_m]
    return np.stack(tiles_HWC[:count])


def best_batch(predictor: Predictor, rgb_NHWC: NDArray[np.uint8], call: Callable[[NDArray[np.uint8]], object]) -> int:
    """The batch size at which `call` is fastest, of a few; the predictor is left at its own."""
    own = predictor.batch_size
    seconds: dict[int, float] = {}
    for batch in sorted({own, *BATCHES[predictor.device.type]}):
        predictor.batch_size = batch
        call(_cycled(rgb_NHWC, 0, batch))
        count = SEARCH_TILES if predictor.device.type == "cpu" else 3 * batch
        tiles_NHWC = _cycled(rgb_NHWC, 0, count)
        seconds[batch] = timed(partial(call, tiles_NHWC)).wall_s / count
    predictor.batch_size = own
    return min(seconds, key=lambda batch: seconds[batch])


def per_tile(
    predictor: Predictor,
    rgb_NHWC: NDArray[np.uint8],
    call: Callable[[NDArray[np.uint8]], object],
    batch: int,
    count: int,
) -> Took:
    """Time of a network per tile, over `count` tiles (at most `MOST_TILES`) that lie in memory."""
    own, predictor.batch_size = predictor.batch_size, batch
    count = max(1, min(count, MOST_TILES))
    call(_cycled(rgb_NHWC, 0, batch))

    def run() -> None:
        for start in range(0, count, batch):
            call(_cycled(rgb_NHWC, start, min(batch, count - start)))

    took = timed(run)
    predictor.batch_size = own
    return Took(took.wall_s / count, took.cpu_s / count)


def timed(run: Callable[[], object]) -> Took:
    """Wall time and CPU time of a call, all threads of this process counted."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def _cycled(rgb_NHWC: NDArray[np.uint8], start: int, count: int) -> NDArray[np.uint8]:
    return rgb_NHWC[(start + np.arange(count)) % len(rgb_NHWC)]
