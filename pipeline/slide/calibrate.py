"""Measure how long a run will take, with one small block of the slide."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from models.predictor import Predictor
from pipeline.config import ResolvedSettings
from pipeline.formats.ome_zarr import MapSpec, MapStore, create_store
from pipeline.slide.blocks import BlockWork
from pipeline.slide.engine import ThreadRunner
from pipeline.slide.plan import PlannedSlide, block_tissue, make_plan, needed_tiles

BLOCK_OUT = 256
"""Side of the measured block in map pixels: a second or two of work on a CPU."""


def seconds_per_tile(planned: PlannedSlide, predictor: Predictor, settings: ResolvedSettings) -> float | None:
    """Return the time of one tile, from reading the slide to writing the map; None for a slide without tissue.

    The block with the most tiles is segmented twice into a temporary folder. The first time, which also warms up the
    libraries, does not count. A run overlaps reading with the networks, so it takes this time or less.
    """
    settings = replace(settings, block_out=min(BLOCK_OUT, settings.block_out), num_workers=1)
    _, slide, tissue, _ = planned
    plan = make_plan(slide.info, tissue, predictor.card, settings)
    if not plan.blocks:
        return None
    counts = {b.index: len(needed_tiles(plan.grid, block_tissue(plan.grid, tissue, b), b)) for b in plan.blocks}
    block = max(plan.blocks, key=lambda b: counts[b.index])
    with tempfile.TemporaryDirectory(prefix="wsi-segment-") as name:
        folder = Path(name)
        spec = MapSpec("a", plan.grid.size_out, predictor.card.classes, plan.grid.mpp_out, chunk=settings.block_out)
        create_store(folder / "store", spec)
        (folder / "regions").mkdir()
        work = BlockWork(slide.info, plan.grid, tissue, settings, MapStore(folder / "store", spec), folder)
        for _ in range(2):
            start = time.perf_counter()
            ThreadRunner(predictor).run(work, slide, [block], lambda _: None)
    return (time.perf_counter() - start) / counts[block.index]
