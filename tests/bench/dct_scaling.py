"""What decoding JPEG tiles at half size, in the DCT, would change in the labels, and what it would save.

    python -m tests.bench.dct_scaling SLIDE [-m MODEL]

libjpeg can leave out the high frequencies while it decodes, which halves the sides of a tile. The slide, whose tiles
must be JPEG, is segmented twice, as it is and with every tile decoded at half size and its pixels doubled again: what
follows, averaging by area, then sees the half-sized pixels. Why this is not done: docs/benchmarks/speed.md.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from models.bundle import DEFAULT_BUNDLE
from pipeline.config import SegmentConfig
from pipeline.slide.recipe import segment_slide
from pipeline.workers.in_process import load_predictor
from wsi.tiff_tiles import TiledImage

_RGB, _YCBCR = (b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([code]) for code in (0, 1))
"""Markers that tell Pillow the colors of a JPEG stream."""


def half_sized(image: TiledImage, index: int) -> NDArray[np.uint8]:
    """A tile decoded by Pillow at half its width and height."""
    page = image.page
    file = page.parent.filehandle
    file.seek(page.dataoffsets[index])
    data = file.read(page.databytecounts[index])
    tables = (page.jpegtables or b"\xff\xd8\xff\xd9")[:-2]
    picture = Image.open(io.BytesIO(tables + (_RGB if page.photometric == 2 else _YCBCR) + data[2:]))
    picture.draft("RGB", (picture.width // 2, picture.height // 2))
    return np.asarray(picture.convert("RGB"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the share of labels that differ, and megapixels per second of both decoders."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dct_scaling")
    parser.add_argument("slide", type=Path)
    parser.add_argument("-m", "--model", default=DEFAULT_BUNDLE, help="name or folder of a bundle")
    options = parser.parse_args(arguments)
    config = SegmentConfig(device="cpu", backend="tiffslide")
    predictor = load_predictor(options.model, config)
    whole, took = TiledImage._tile, {"whole": [0, 0.0], "half": [0, 0.0]}

    def timed(name: str, decode: Callable[[], NDArray[np.uint8]], pixels: int) -> NDArray[np.uint8]:
        begun = time.thread_time()
        tile_HWC = decode()
        took[name][0] += pixels
        took[name][1] += time.thread_time() - begun
        return tile_HWC

    def plain(image: TiledImage, index: int, confirm: Callable[[], None]) -> NDArray[np.uint8]:
        return timed("whole", lambda: whole(image, index, confirm), image.tile_size[0] * image.tile_size[1])

    def doubled(image: TiledImage, index: int, confirm: Callable[[], None]) -> NDArray[np.uint8]:
        del confirm
        tile_HWC = timed("half", lambda: half_sized(image, index), image.tile_size[0] * image.tile_size[1])
        return tile_HWC.repeat(2, axis=0).repeat(2, axis=1)

    maps = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tile in (("whole", plain), ("half", doubled)):
            with mock.patch.object(TiledImage, "_tile", tile):
                result = segment_slide(options.slide, Path(folder) / name, predictor, config)
            assert result.folder is not None
            store = result.folder / f"{options.slide.stem}.ome.zarr"
            maps.append(np.asarray(zarr.open_array(store / "labels" / "classes" / "0", mode="r")[:]))
    differ_HW, tissue_HW = maps[0] != maps[1], (maps[0] > 0) | (maps[1] > 0)
    print(f"labels that differ: {differ_HW.mean():.2%}, of the tissue {differ_HW[tissue_HW].mean():.2%}")
    for name, (pixels, seconds) in took.items():
        print(f"decoded {name}: {pixels / 1e6 / seconds:.0f} megapixels of the level per second of processor time")


if __name__ == "__main__":
    main()
