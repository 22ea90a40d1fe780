"""Geometry of a slide: its frames, and the grid of tiles and blocks.

Names end with the frame of their coordinates. x comes before y, and width before height:

    l0   level-0 pixels of the file
    lv   pixels of the level that is read
    m    pixels at the model's resolution
    out  pixels of the stored map
    um   micrometers

The origin of the frames m and out is the corner of the slide's bounds, as in QuPath.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsi.box import Box
from wsi.errors import ResolutionError
from wsi.levels import MPP_TOLERANCE, pick_level
from wsi.slide import SlideInfo
from wsi.windows import window_starts

COARSEST_FACTOR = 4.0
"""A slide that is more than this many times coarser than the model is refused. Up to there it is upsampled."""


TILE_M = 256
"""Side of a tile in model pixels. A run counts tissue, unreadable places and skipped work in tiles."""


@dataclass(frozen=True)
class Block:
    """One unit of work: a square of whole output chunks."""

    index: int
    """Number of the block in the grid, row by row."""
    box_out: Box


@dataclass(frozen=True)
class Grid:
    """The tiles and blocks of one slide, and the conversions between its frames. Immutable and picklable.

    Tile i starts at model pixel i * tile_m. The last tile and the last block of a row may reach beyond the slide.
    """

    level: int
    origin_lv: tuple[int, int]
    """Corner (x, y) of the slide's bounds, in level pixels."""
    l0_per_lv: float
    lv_per_m: float
    """Level pixels per model pixel; a whole number if `MPP_TOLERANCE` allows it."""
    mpp_m: float
    """Micrometers per model pixel as read. It differs from the model's own by up to `MPP_TOLERANCE`."""
    size_m: tuple[int, int]
    tile_m: int
    m_per_out: int
    block_out: int

    @property
    def l0_per_out(self) -> float:
        """Return the level-0 pixels per pixel of the stored map."""
        return self.l0_per_lv * self.lv_per_m * self.m_per_out

    @property
    def mpp_out(self) -> float:
        """Return the micrometers per pixel of the stored map."""
        return self.mpp_m * self.m_per_out

    @property
    def size_out(self) -> tuple[int, int]:
        """Return (width, height) of the stored map, which covers the bounds."""
        return _ceil_div(self.size_m[0], self.m_per_out), _ceil_div(self.size_m[1], self.m_per_out)

    def blocks(self) -> list[Block]:
        """Return all blocks, row by row. They cover the map and do not overlap."""
        columns, rows = (_ceil_div(length, self.block_out) for length in self.size_out)
        side = self.block_out
        return [
            Block(row * columns + column, Box(column * side, row * side, side, side))
            for row in range(rows)
            for column in range(columns)
        ]

    def tiles(self, box_out: Box) -> list[Box]:
        """Return the tiles that overlap a box of the map, as boxes in model pixels, row by row."""
        box_m = self.box_m(box_out)
        columns = self._starts(box_m.x, box_m.right, self.size_m[0])
        rows = self._starts(box_m.y, box_m.bottom, self.size_m[1])
        return [Box(x, y, self.tile_m, self.tile_m) for y in rows for x in columns]

    def box_m(self, box_out: Box) -> Box:
        """Return a box of the map in model pixels."""
        s = self.m_per_out
        return Box(box_out.x * s, box_out.y * s, box_out.width * s, box_out.height * s)

    def box_out(self, box_m: Box) -> Box:
        """Return a box in model pixels, which is aligned to the map's pixels, in pixels of the map."""
        return box_m.reduce(self.m_per_out)

    def box_lv(self, box_m: Box) -> Box:
        """Return the smallest box of level pixels that covers a box in model pixels."""
        x, right = self._span_lv(0, box_m.x, box_m.right)
        y, bottom = self._span_lv(1, box_m.y, box_m.bottom)
        return Box(x, y, right - x, bottom - y)

    def outer_box_m(self, box_lv: Box) -> Box:
        """Return a box of the level in model pixels, rounded outward."""
        (left, top), f = self.origin_lv, self.lv_per_m
        x, y = math.floor((box_lv.x - left) / f), math.floor((box_lv.y - top) / f)
        return Box(x, y, math.ceil((box_lv.right - left) / f) - x, math.ceil((box_lv.bottom - top) / f) - y)

    def box_l0(self, box_m: Box) -> Box:
        """Return a box in model pixels in level-0 pixels of the file, rounded outward."""
        box_lv, d = self.box_lv(box_m), self.l0_per_lv
        x, y = math.floor(box_lv.x * d), math.floor(box_lv.y * d)
        return Box(x, y, math.ceil(box_lv.right * d) - x, math.ceil(box_lv.bottom * d) - y)

    def _span_lv(self, axis: int, start_m: int, stop_m: int) -> tuple[int, int]:
        origin = self.origin_lv[axis]
        return origin + math.floor(start_m * self.lv_per_m), origin + math.ceil(stop_m * self.lv_per_m)

    def _starts(self, start_m: int, stop_m: int, size_m: int) -> list[int]:
        every = window_starts(size_m, self.tile_m, self.tile_m, flush=False)
        return [start for start in every if start_m - self.tile_m < start < stop_m]


def make_grid(info: SlideInfo, *, model_mpp: float, output_stride: int, block_out: int, tile_m: int = TILE_M) -> Grid:
    """Choose the level to read, and lay tiles and blocks over the slide's bounds.

    The level is that of `pick_level` for `model_mpp` micrometers per pixel.

    Raises ResolutionError if the slide is more than `COARSEST_FACTOR` times coarser than the model.
    """
    finest = info.mpp / model_mpp
    if finest > COARSEST_FACTOR:
        raise ResolutionError(
            f"{info.path.name}: {info.mpp:g} µm/px (source: {info.mpp_source}) is too coarse for a model of "
            f"{model_mpp:g} µm/px (at most {COARSEST_FACTOR * model_mpp:g}); use a slide of higher magnification, or "
            f"pass the correct pixel size with --mpp"
        )
    downsamples = info.level_downsamples
    level = pick_level(downsamples, model_mpp / info.mpp)
    lv_per_m = model_mpp / (info.mpp * downsamples[level])
    if abs(lv_per_m / max(1, round(lv_per_m)) - 1) <= MPP_TOLERANCE:
        lv_per_m = float(max(1, round(lv_per_m)))
    l0_per_m = lv_per_m * downsamples[level]
    return Grid(
        level=level,
        # Rounding moves the map by at most half a level pixel; a fraction would blur every pixel.
        origin_lv=(round(info.bounds_l0.x / downsamples[level]), round(info.bounds_l0.y / downsamples[level])),
        l0_per_lv=downsamples[level],
        lv_per_m=lv_per_m,
        mpp_m=info.mpp * l0_per_m,
        size_m=(math.ceil(info.bounds_l0.width / l0_per_m), math.ceil(info.bounds_l0.height / l0_per_m)),
        tile_m=tile_m,
        m_per_out=output_stride,
        block_out=block_out,
    )


def whole_pixels_m(info: SlideInfo, grid: Grid) -> Box:
    """Return the model pixels that lie inside the slide's bounds as a whole."""
    bounds, l0_per_m = info.bounds_l0, grid.l0_per_lv * grid.lv_per_m
    # The product of two ratios may be a little too small.
    return Box(0, 0, int(bounds.width / l0_per_m + 1e-6), int(bounds.height / l0_per_m + 1e-6))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
