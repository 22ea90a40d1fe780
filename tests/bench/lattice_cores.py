"""The cores of a run and their probabilities, for `tests/bench/lattice.py`. Shape suffix: K classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.backbone_windows import RING as FEATURES_AROUND
from models.bundle import load_bundle, load_networks
from models.predictor import Predictor
from models.runtimes import CONTEXT
from pipeline.config import MapSettings
from pipeline.slide.canvases import canvas_cores, with_margin
from pipeline.slide.plan import backbone_windows, block_tissue
from wsi.box import Box
from wsi.grid import Grid, make_grid
from wsi.resample import read_tiles
from wsi.slide import Slide
from wsi.tissue import Tissue


def grid_of(slide: Slide, predictor: Predictor) -> Grid:
    """Return a grid with the predictor's output stride, whose blocks are those of a run with the default stride."""
    stride = predictor.output_stride
    block_out = MapSettings().output_stride // stride * MapSettings().block_out
    return make_grid(slide.info, model_mpp=predictor.card.mpp, output_stride=stride, block_out=block_out)


def predicted_cores(
    slide: Slide, grid: Grid, tissue: Tissue, predictor: Predictor, canvas_m: int | None
) -> Iterator[tuple[Box, int, Tensor]]:
    """Yield each core, as in a run, in model pixels, the number of pixels computed for it, and its probabilities.

    Probabilities are (K, h, w). Nothing is skipped outside the canvases.
    """
    classes, margin = len(predictor.card.classes), predictor.card.margin
    for block in grid.blocks():
        cores_m = canvas_cores(grid, block_tissue(grid, tissue, block), block, predictor.card, canvas_m)
        if not cores_m:
            continue
        canvases_m = [with_margin(core_m, margin) for core_m in cores_m]
        pixels_m = read_tiles(
            slide, grid, [with_margin(core_m, margin + FEATURES_AROUND + CONTEXT) for core_m in cores_m]
        )
        stride = grid.m_per_out
        probs = [torch.empty((classes, core_m.height // stride, core_m.width // stride)) for core_m in cores_m]
        places = [canvas_m.slices(pixels_m.canvas_m) for canvas_m in canvases_m]
        corners = [(core_m.x, core_m.y) for core_m in cores_m]
        block_m = grid.box_m(block.box_out)
        there = predictor.on_device(pixels_m.canvas_HWC)
        predictor.predict_into(probs, there, places, corners, block=block_m.slices(pixels_m.canvas_m))
        windows = backbone_windows(cores_m, block_m, predictor.card)
        pixels = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in windows]
        yield from zip(cores_m, pixels, probs, strict=True)


def make_predictor(model: str, margin: int | None, output_stride: int) -> Predictor:
    """Return the predictor of a bundle, with another margin than the model's if one is given."""
    bundle = load_bundle(model)
    card = bundle.card if margin is None else bundle.card.model_copy(update={"margin": margin})
    networks = load_networks(bundle)
    return Predictor.from_networks(
        card, bundle.digest, *networks, device="cpu", runtime="auto", output_stride=output_stride
    )
