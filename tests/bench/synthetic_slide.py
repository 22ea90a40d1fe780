"""Makes a slide of any size with a chosen amount of real tissue.

    python -m tests.bench.synthetic_slide SOURCE.svs -o FILE --size 100000 80000 --tissue 4

Compressed tiles of the source slide are copied as they are, on all levels, in fields as large as one tile of the
coarsest level: nothing is decoded or encoded, and every pixel of every level is the source's. `--tissue` counts in
times the source's own tissue; the first copy takes fields of the source row by row until there is enough, the next ones
lie beside and below. What is not tissue is filled with the tiles of a field of glass.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsi.box import Box
from wsi.slide import BACKGROUND, open_slide
from wsi.tissue import find_tissue


@dataclass(frozen=True)
class Level:
    """One tiled image of the source, and how many of its tiles lie along the side of a field."""

    page: Any
    tiles_per_field: int

    @property
    def columns(self) -> int:
        """Tiles in a row, the one cut by the edge counted."""
        return -(-int(self.page.imagewidth) // int(self.page.tilewidth))

    def index(self, field: tuple[int, int], row: int, column: int) -> int:
        """Number of a tile of a field (row and column), among the level's tiles."""
        n = self.tiles_per_field
        return (field[0] * n + row) * self.columns + field[1] * n + column

    def field_bytes(self, field: tuple[int, int]) -> int:
        """Compressed size of a field's tiles."""
        n = self.tiles_per_field
        return sum(self.page.databytecounts[self.index(field, row, column)] for row, column in np.ndindex(n, n))


@dataclass(frozen=True)
class Source:
    """A tiled slide cut into whole fields; what is left at its right and bottom edge is not used."""

    levels: tuple[Level, ...]
    field_l0: int
    """Side of a field in level-0 pixels."""
    tissue_um2: NDArray[np.float64]
    """Per field, as rows and columns."""
    mpp: float
    power: str | None

    def glass(self) -> tuple[int, int]:
        """Return row and column of a field without tissue. Raises ValueError if every field has some."""
        empty = [(int(y), int(x)) for y, x in np.argwhere(self.tissue_um2 == 0)]
        if not empty:
            raise ValueError("the source slide has no field of glass; take one with a free margin")
        # Dust and pale tissue take more bytes than clean glass.
        return min(empty, key=self.levels[0].field_bytes)


def read_source(tiff: tifffile.TiffFile, path: Path) -> Source:
    """Read a slide's levels and find its tissue. Raises ValueError if fields cannot be laid over the slide."""
    everything: Any = tiff.pages
    pages = [page for page in everything if page.is_tiled]
    tile = int(pages[0].tilewidth)
    factors = [round(pages[0].imagewidth / page.imagewidth) for page in pages]
    field_l0 = tile * max(factors)
    for page, factor in zip(pages, factors, strict=True):
        exact = abs(pages[0].imagewidth / factor - page.imagewidth) <= 1
        if (page.tilewidth, page.tilelength) != (tile, tile) or not exact or max(factors) % factor:
            raise ValueError(f"{path.name}: levels of {factors} times and tiles of {page.tilewidth}×{page.tilelength}")
    levels = tuple(Level(page, field_l0 // factor // tile) for page, factor in zip(pages, factors, strict=True))
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
        width, height = slide.info.size_l0
        rows, columns = height // field_l0, width // field_l0
        side = 64
        um2 = (field_l0 / side * slide.info.mpp) ** 2
        fields = [
            [tissue.sample(Box(x * side, y * side, side, side), field_l0 / side).sum() * um2 for x in range(columns)]
            for y in range(rows)
        ]
        power = pages[0].description.partition("AppMag = ")[2].partition("|")[0].strip()
        return Source(levels, field_l0, np.array(fields, np.float64).reshape(rows, columns), slide.info.mpp, power)


def layout(source: Source, size: tuple[int, int], tissue: float) -> NDArray[np.int64]:
    """Return the source field of each field of the slide, as (rows, columns, 2): source row and column.

    Raises ValueError if that many copies of the source's tissue do not fit into `size` (level-0 pixels).
    """
    rows, columns = (-(-length // source.field_l0) for length in (size[1], size[0]))
    field_rows, field_columns = source.tissue_um2.shape
    # Only whole copies: a copy cut by the edge would have less tissue than it counts for.
    across, down = columns // field_columns, rows // field_rows
    chosen = np.empty((rows, columns, 2), np.int64)
    chosen[:] = source.glass()
    missing = tissue * source.tissue_um2.sum()
    for copy in range(math.ceil(tissue)):
        if copy >= across * down:
            raise ValueError(f"{tissue:g} times the source's tissue need more than {size[0]}×{size[1]} pixels")
        top, left = copy // across * field_rows, copy % across * field_columns
        for y, x in np.ndindex(field_rows, field_columns):
            if missing > source.tissue_um2[y, x] / 2:
                chosen[top + y, left + x] = (y, x)
                missing -= source.tissue_um2[y, x]
    return chosen


def write_synthetic(source_path: Path, path: Path, size: tuple[int, int], tissue: float) -> Path:
    """Write the slide, an Aperio BigTIFF that OpenSlide and tiffslide open; returns its path. Raises ValueError."""
    with tifffile.TiffFile(source_path) as tiff:
        source = read_source(tiff, source_path)
        chosen = layout(source, size, tissue)
        about = [f"AppMag = {source.power}"] * bool(source.power) + [f"MPP = {source.mpp:g}"]
        description = "|".join([f"Aperio Image Library (synthetic)\r\n{size[0]}x{size[1]}", *about])
        with tifffile.TiffWriter(path, bigtiff=True) as out:
            for number, level in enumerate(source.levels):
                if number == 1:  # Aperio's second image is a thumbnail in strips
                    glass_HWC = np.full((128, 128 * size[0] // size[1], 3), BACKGROUND, np.uint8)
                    out.write(glass_HWC, photometric="rgb", description=description, metadata=None)
                _write_level(out, level, chosen, size, source.field_l0, description)
    return path


def _write_level(
    out: tifffile.TiffWriter,
    level: Level,
    chosen: NDArray[np.int64],
    size: tuple[int, int],
    field_l0: int,
    description: str,
) -> None:
    page, tile = level.page, int(level.page.tilewidth)
    factor = field_l0 // (level.tiles_per_field * tile)
    width, height = size[0] // factor, size[1] // factor
    subsampling = page.tags.get("YCbCrSubSampling")
    out.write(
        _tiles(level, chosen, -(-width // tile), -(-height // tile)),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(tile, tile),
        photometric=page.photometric,
        compression=page.compression,
        # The file says what its JPEG tiles hold; without this tifffile takes all of them for YCbCr.
        compressionargs={"outcolorspace": page.photometric.name} if page.compression.name == "JPEG" else None,
        jpegtables=page.jpegtables,
        predictor=None if page.predictor == 1 else page.predictor,
        subsampling=subsampling and subsampling.value,
        subfiletype=0,
        description=description,
        metadata=None,
    )


def _tiles(level: Level, chosen: NDArray[np.int64], columns: int, rows: int) -> Iterator[bytes]:
    """The compressed tiles of a level, row by row."""
    page, n = level.page, level.tiles_per_field
    handle = page.parent.filehandle
    for row in range(rows):
        for column in range(columns):
            y, x = chosen[row // n, column // n]
            index = level.index((int(y), int(x)), row % n, column % n)
            handle.seek(page.dataoffsets[index])
            yield handle.read(page.databytecounts[index])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the slide and say what it holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.synthetic_slide", description=(__doc__ or "")[:66])
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(100_000, 80_000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tissue", type=float, default=1.0, help="times the tissue of the source")
    options = parser.parse_args(arguments)
    path = write_synthetic(options.source, options.output, (options.size[0], options.size[1]), options.tissue)
    with open_slide(path) as slide:
        area = find_tissue(slide).area_um2 / 1e6
        sizes = ", ".join(f"{w}×{h}" for w, h in slide.info.level_sizes)
        print(
            f"{path}: {sizes}; {slide.info.mpp:g} µm/px, {area:.2f} mm² of tissue, {path.stat().st_size / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
