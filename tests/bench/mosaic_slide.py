"""Write a slide with the images of a data set side by side, to look for borders of canvases.

    python -m tests.bench.mosaic_slide glas --data FOLDER -o mosaic.tiff
    python -m tests.bench.lattice steps mosaic.tiff

We found no open whole slide of the colon. The borders between the images are part of the slide, so `steps` compares
borders of canvases with lines beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.training.dataset import load_dataset, read_rgb, samples
from pipeline.training.resample import resampled
from tests.slides import write_slide

MPP = 1.0
"""Pixel size of the slide in µm."""
GLASS = 243
EDGE = 200
"""Pixels of glass around the images."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=13)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    dataset = load_dataset(options.dataset, options.data)
    chosen = [sample for split in dataset.card.splits for sample in samples(dataset, split)]
    images = [resampled(read_rgb(sample), dataset.mpp / MPP) for sample in chosen]
    rgb_HWC = mosaic(images, options.columns)
    write_slide(options.output, rgb_HWC, mpp=MPP, levels=(1, 4))
    print(f"{options.output}: {rgb_HWC.shape[1]}x{rgb_HWC.shape[0]} px at {MPP} um/px, of {len(images)} images")


def mosaic(images: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Return the images (h, w, 3) in rows of this number, mirrored to the largest height and width, on glass."""
    height, width = np.max([image.shape[:2] for image in images], axis=0).tolist()
    rows = -(-len(images) // columns)
    rgb_HWC = np.full((rows * height + 2 * EDGE, columns * width + 2 * EDGE, 3), GLASS, np.uint8)
    for n, image in enumerate(images):
        y, x = EDGE + n // columns * height, EDGE + n % columns * width
        more = [(0, side - own) for side, own in zip((height, width), image.shape, strict=False)]
        rgb_HWC[y : y + height, x : x + width] = np.pad(image, (*more, (0, 0)), mode="symmetric")
    return rgb_HWC


if __name__ == "__main__":
    main()
