"""Holds the label map of a run against the plain path's.

    python -m tests.bench.agreement SLIDE [-m MODEL] [--precision bf16] [--json FILE]

The plain path: OpenSlide, one block after the other, batches of one canvas, PyTorch in float32 on the CPU, the
segmenter on every part of every canvas. The run: `segment_slide` with the settings given. Both divide blocks into the
same canvases and join the deep features of a block in the same way, so errors of these steps do not show here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from models.backbone_windows import RING
from models.bundle import load_bundle
from models.predictor import Predictor
from models.runtimes import CONTEXT
from pipeline.config import SegmentConfig
from pipeline.slide.canvases import canvas_cores, with_margin
from pipeline.slide.drawn_tissue import drawn_tissue, edge_margin
from pipeline.slide.labels import stored_map
from pipeline.slide.plan import block_tissue, plan_slide
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from tests.bench.slide import slide_parser
from wsi.grid import whole_pixels_m
from wsi.mirror import mirror_outside, with_sources
from wsi.resample import read_model_pixels, read_tiles


def plain_labels(path: Path, model: str, config: SegmentConfig) -> NDArray[np.uint8]:
    """labels_HW of the whole map, the slow way."""
    bundle = load_bundle(model)
    predictor = Predictor.from_bundle(
        bundle,
        device=config.device,
        batch_size=1,
        output_stride=config.output_stride,
        ungated_fallback=config.keep_ungated,
        skip_by_gate=False,
    )
    _, slide, tissue, plan = plan_slide(path, bundle.card, replace(config, backend="openslide"))
    grid = plan.grid
    labels_HW = np.zeros(grid.size_out[::-1], np.uint8)
    with slide:
        for number, block in enumerate(plan.blocks):
            print(f"\rplain path: block {number + 1} of {len(plan.blocks)}", end="", file=sys.stderr)
            box, margin = block.box_out, bundle.card.margin
            cores_m = canvas_cores(grid, block_tissue(grid, tissue, block), block, bundle.card, config.canvas_m)
            around, inside_m = max(margin + RING + CONTEXT, edge_margin(grid)), whole_pixels_m(slide.info, grid)
            boxes_m = [with_sources(with_margin(core_m, around), inside_m, grid.m_per_out) for core_m in cores_m]
            pixels = read_tiles(slide, grid, boxes_m)
            tissue_HW = drawn_tissue(grid, tissue, block, pixels)
            rgb_HWC, rgb_m = read_model_pixels(slide, grid, pixels.canvas_m).rgb_HWC, pixels.canvas_m
            mirror_outside(rgb_HWC, rgb_m, inside_m)
            probs_KHW = torch.zeros((len(bundle.card.classes), box.height, box.width))
            predictor.predict_into(
                [probs_KHW[:, *grid.box_out(core_m).slices(box)] for core_m in cores_m],
                predictor.on_device(rgb_HWC),
                [with_margin(core_m, margin).slices(rgb_m) for core_m in cores_m],
                [(core_m.x, core_m.y) for core_m in cores_m],
                block=grid.box_m(box).slices(rgb_m),
            )
            part_HW = labels_HW[box.y : box.bottom, box.x : box.right]
            part_HW[:] = stored_map(probs_KHW, tissue_HW).labels_HW[: part_HW.shape[0], : part_HW.shape[1]]
    print(file=sys.stderr)
    return labels_HW


def run_labels(path: Path, model: str, config: SegmentConfig) -> NDArray[np.uint8]:
    """labels_HW of the whole map, as a run stores it."""
    with tempfile.TemporaryDirectory() as folder:
        result = segment_slide(path, Path(folder), load_predictor(model, config), config)
        assert result.folder is not None
        stored = zarr.open_array(result.folder / f"{path.stem}.ome.zarr" / "labels" / "classes" / "0", mode="r")
        return np.asarray(stored[:])


def compare(plain_HW: NDArray[np.uint8], run_HW: NDArray[np.uint8]) -> dict[str, Any]:
    """Pixels that are equal, of the whole map and of what is not background in both."""
    run_HW = run_HW[: plain_HW.shape[0], : plain_HW.shape[1]]
    assert plain_HW.shape == run_HW.shape
    differs_HW = plain_HW != run_HW
    tissue_HW = (plain_HW > 0) | (run_HW > 0)
    return {
        "pixels": plain_HW.size,
        "tissue_pixels": int(tissue_HW.sum()),
        "different": int(differs_HW.sum()),
        "equal_share": 1 - float(differs_HW.mean()),
        "equal_share_of_tissue": 1 - float(differs_HW.sum() / max(1, tissue_HW.sum())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both maps, print how well they agree, and write the figures if `--json` is given."""
    options = vars(slide_parser("tests.bench.agreement", __doc__).parse_args(arguments))
    path, model, file = (options.pop(name) for name in ("slide", "model", "json"))
    config = SegmentConfig(**options)
    found = {"slide": path.name, "model": model, **options}
    plain = replace(config, precision="float32", device="cpu")
    found |= compare(plain_labels(path, model, plain), run_labels(path, model, config))
    text = json.dumps(found, indent=2)
    print(text)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
