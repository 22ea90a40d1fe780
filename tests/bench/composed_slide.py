"""Compose a demonstration slide of real tissue from the tiles of one slide of kather-2016.

    python -m tests.bench.composed_slide --data FOLDER --slide 05 -o composed.tiff

No open slide of colorectal cancer could be had whose tissues are known. This one is a mosaic: every pixel of tissue is
real, and the arrangement is not. Beside FILE, FILE.truth.png holds the known tissues in the classes' colors, at a
quarter of the resolution; gray areas contain stroma and immune cells without a known class of each pixel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.training.compose import compose_image
from pipeline.training.dataset import Dataset, load_dataset
from pipeline.training.dataset_sections import TableSplit
from pipeline.training.pieces import kinds_of, pieces_of
from tests.slides import write_slide

MPP = 1.0
"""Pixel size of the slide in µm: coarser than that of the tiles, so that cells of a whole slide fit into memory."""
GLASS = 243
MARGIN = 0.08
"""Share of the side that is glass at each edge."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--slide", default="05")
    parser.add_argument("--side", type=int, default=1200, help="side of the slide in pixels of 1 um")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    dataset = of_one_slide(load_dataset("kather-2016", options.data), options.slide, options.side)
    rgb_HWC, values_HW = composed_tissue(dataset, options.seed)
    write_slide(options.output, rgb_HWC, mpp=MPP, levels=(1, 4))
    colors = np.array([*(spec.color for spec in dataset.card.classes), *[(150, 150, 150)] * 10], np.uint8)
    Image.fromarray(colors[values_HW[::4, ::4]]).save(f"{options.output}.truth.png")
    print(f"{options.output}: {rgb_HWC.shape[1]}x{rgb_HWC.shape[0]} px at {MPP} um/px")


def of_one_slide(dataset: Dataset, slide: str, side: int) -> Dataset:
    """Return the data set with one slide as its validation split, and one composed image of this side."""
    others = sorted({"01", "02", "03", "04", "05", "06", "08"} - {slide})
    split = TableSplit(by="table", column="slide", train=tuple(others), val=(slide,), test=())
    assert dataset.card.compose is not None
    compose = dataset.card.compose.model_copy(update={"mpp": MPP, "side": side, "blank": None})
    return Dataset(dataset.card.model_copy(update={"split": split, "compose": compose}), dataset.root)


def composed_tissue(dataset: Dataset, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a composed image (H, W, 3) with a margin of glass, and its tissues (H, W) as indices of `kinds_of`."""
    rule, kinds = dataset.card.compose, kinds_of(dataset)
    assert rule is not None
    rng = np.random.default_rng(seed)
    rgb_HWC, values_HW = compose_image(pieces_of(dataset, "val"), kinds, rule, rng)
    edge = round(rule.side * MARGIN)
    outside_HW = np.ones(values_HW.shape, dtype=bool)
    outside_HW[edge:-edge, edge:-edge] = False
    rgb_HWC[outside_HW] = GLASS
    values_HW[outside_HW] = kinds.index(("glass",))
    return rgb_HWC, values_HW


if __name__ == "__main__":
    main()
