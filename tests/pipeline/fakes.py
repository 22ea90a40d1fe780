"""Slides with known regions and networks with known outputs, for the pipeline's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from torch import nn

from models.predictor import Predictor
from models.runtimes import Compute
from pipeline.config import SegmentConfig
from tests.models.networks import (
    ColorClassifier,
    ColorSegmenter,
    ConstantClassifier,
    ConstantSegmenter,
    make_card,
)
from tests.slides import PINK, PURPLE, painted, write_slide
from wsi.readers import Reader

SMALL = SegmentConfig(block_out=32, min_area_um2=0.0, simplify_px=0.0, num_workers=2, device="cpu")
"""Blocks of 32 map pixels, so that a slide of a few thousand pixels has dozens of blocks."""

CPU = Compute(device="cpu", precision="float32", runtime="torch", batch_size=1, threads=1, processor="any")
"""Settings of the predictors of this module."""

COLORS = (PINK, PURPLE)

REGIONS = (((160, 96, 960, 640), PINK), ((416, 256, 320, 256), PURPLE))
"""Boxes (level-0 x, y, width, height) and colors of `region_slide`. Later boxes lie on top of earlier ones."""


def region_slide(path: Path, mpp: float = 1.0, levels: Sequence[int] = (1,)) -> Path:
    """Write a slide of 1280×832 pixels with a pink region and a purple region inside it. Return the path."""
    return write_slide(path, painted((1280, 832), *REGIONS), mpp=mpp, levels=levels)


def predictor(
    classifier: nn.Module, segmenter: nn.Module, mpp: float = 1.0, margin: int = 32, **options: Any
) -> Predictor:
    """Return a predictor for classes in the slide's colors, with gate windows of 64 px."""
    digest = f"{type(classifier).__name__}-{type(segmenter).__name__}".ljust(64, "0")
    card = make_card(COLORS, mpp=mpp, margin=margin)
    return Predictor(card, digest, classifier, segmenter, device="cpu", **options)


def color_predictor(**options: Any) -> Predictor:
    """Return a predictor that classifies every pixel by its color."""
    return predictor(ColorClassifier(COLORS), ColorSegmenter(COLORS, sharpness=400.0), **options)


def constant_predictor(logits: Sequence[float]) -> Predictor:
    """Return a predictor whose output is the same for every pixel."""
    return predictor(ConstantClassifier([0.9] * len(logits)), ConstantSegmenter(logits))


def run_of(folder: Path) -> dict[str, Any]:
    """Return the content of a result's run.json."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return run


def probs_of(folder: Path) -> NDArray[np.uint8]:
    """Return the full map of a result, as probs_KHW."""
    return np.asarray(zarr.open_array(folder / f"{folder.name}.ome.zarr" / "0", mode="r")[:])


def labels_of(folder: Path) -> NDArray[np.uint8]:
    """Return the full label image of a result, as labels_HW."""
    return np.asarray(zarr.open_array(folder / f"{folder.name}.ome.zarr" / "labels" / "classes" / "0", mode="r")[:])


def truth(size_out: tuple[int, int], l0_per_out: int) -> NDArray[np.uint8]:
    """Return the labels of `region_slide` at a whole number of level-0 pixels per map pixel."""
    labels_HW = np.zeros(size_out[::-1], np.uint8)
    for (x, y, width, height), color in REGIONS:
        x, y, right, bottom = (round(v / l0_per_out) for v in (x, y, x + width, y + height))
        labels_HW[y:bottom, x:right] = COLORS.index(color) + 1
    return labels_HW


def published(folder: Path) -> dict[str, bytes]:
    """Return every file of a result except run.json, which contains times, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


CORNER = (64, 32)
"""Upper left corner of the bounds that `stating_bounds` adds."""


def stating_bounds(open_reader: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    """Return a reader whose slides state bounds of 1280×832 pixels, as MIRAX and Leica slides do."""

    def opened(path: Path) -> Reader:
        reader = open_reader(path)
        bounds = {"x": CORNER[0], "y": CORNER[1], "width": 1280, "height": 832}
        reader.properties = {**reader.properties, **{f"openslide.bounds-{k}": str(v) for k, v in bounds.items()}}
        return reader

    return opened


def data_of(folder: Path) -> dict[str, bytes]:
    """Return every array and polygon file of a result, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.suffix in (".geojson", ".parquet") or ".ome.zarr" in str(path))
    }
