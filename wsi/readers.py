"""The libraries that decode slides, behind one protocol.

A new library is one class here and its entry in `READERS`. The command, the settings and the search of folders read the
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import openslide
import tifffile
import tiffslide
from numpy.typing import NDArray

from wsi.box import Box
from wsi.tiff_checks import check_bytes, check_tile_bytes
from wsi.tiff_tiles import JPEG, JPEG_2000, TiledImage, tiled_image

BackendName = str
"""A key of `READERS`."""

CACHE_BYTES = 16 << 20
"""Bytes of decoded tiles that an OpenSlide handle caches: one row of tiles under a block. Each thread has a handle."""

LARGEST_TILE_PX = 1 << 26
"""Pixels of the largest tile or strip that is decoded: 8192×8192, 256 MiB in OpenSlide. Scanners write tiles of 240 to
4096 pixels a side. OpenSlide aborts the process if it cannot allocate a tile, so the sizes in the file are checked, and
the bytes that a compressed tile claims (`wsi.tiff_checks`)."""


class Reader(Protocol):
    """An open slide file. Threads must not share it: `wsi.slide.Slide` opens one per thread.

    A class may state `suffixes`, the file name endings, in lower case, that a folder is searched for.
    """

    level_sizes: tuple[tuple[int, int], ...]
    """(width, height) of every level, the largest first."""
    properties: Mapping[str, str]
    """Properties under the names that OpenSlide gives them, such as `openslide.mpp-x`."""

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        """Return the pixels of a box inside the level as rgb_HWC; transparent pixels are white."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class OpenSlideReader:
    """Read slides with the OpenSlide library: all its vendor formats."""

    suffixes: ClassVar[frozenset[str]] = frozenset(
        {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".avs", ".vms", ".vmu", ".svslide", ".dcm", ".czi"}
    )

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        try:
            _check_tiles(_openslide_tiles(self._slide))
            check_tile_bytes(path)
        except BaseException:
            self._slide.close()
            raise
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.level_sizes: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self.properties: Mapping[str, str] = dict(self._slide.properties)

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        # OpenSlide expects the corner in level-0 pixels at every level.
        downsample = self._slide.level_downsamples[level]
        corner_l0 = (round(box_lv.x * downsample), round(box_lv.y * downsample))
        rgba_HWC = np.asarray(self._slide.read_region(corner_l0, level, (box_lv.width, box_lv.height)))
        rgb_HWC = rgba_HWC[..., :3].copy()
        alpha_HW = rgba_HWC[..., 3]
        if alpha_HW.min(initial=255) < 255:
            rgb_HWC[alpha_HW == 0] = 255
        return rgb_HWC

    def close(self) -> None:
        self._slide.close()


MOST_CHANNELS = 16
"""Channels per pixel that are decoded, although only three are used. A damaged file can claim tens of thousands."""


class _LevelAddressed(tiffslide.TiffSlide):
    """A slide whose regions are addressed in pixels of their own level, so that no corner is rounded."""

    def _read_region_loc_transform(self, location: tuple[int, int], level: int) -> tuple[int, int]:  # noqa: ARG002
        return location


class TiffSlideReader:
    """Read slides with tiffslide (tifffile and imagecodecs): TIFF-based formats only, but faster."""

    suffixes: ClassVar[frozenset[str]] = frozenset({".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif"})

    def __init__(self, path: Path) -> None:
        self._path = path
        if "::" in str(path):  # fsspec, which opens the file, would take the part before it as another file
            raise ValueError('the path contains "::", which tiffslide cannot read; rename the file or its folder')
        self._slide = _LevelAddressed(path)
        try:
            levels = list(_possible_levels(self._slide))
            _check_tiles(map(_tile_size, levels))
            _check_channels(map(_channels, levels))
            _check_colors(levels)
            self._images = self._tiled_images()
            if not self._images:  # else checked when a tile is read
                _check_tile_bytes(levels, path.stat().st_size)
        except BaseException:
            self._slide.close()
            raise
        self.level_sizes: tuple[tuple[int, int], ...] = tuple(self._slide.level_dimensions)
        self.properties: Mapping[str, str] = {
            name.replace("tiffslide.", "openslide.", 1): str(value)
            for name, value in self._slide.properties.items()
            if value is not None
        }
        self._has_alpha = all(map(_has_alpha, levels))
        self._is_premultiplied = self._has_alpha and any(map(_is_premultiplied, levels))
        self._is_gray = self._has_alpha and _colors(levels[0]) == "MINISBLACK"

    @property
    def images(self) -> Sequence[TiledImage]:
        """Return the levels if each is one TIFF image of 8-bit RGB tiles, else an empty sequence."""
        return self._images

    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        if self._images:
            image = self._images[level]
            return image.read(box_lv, lambda tile_lv: self._confirm(level, tile_lv))
        pixels_HWC = self._slide.read_region(box_lv[:2], level, box_lv[2:], as_array=True)
        if pixels_HWC.dtype != np.uint8:
            raise ValueError(f"pixels are {pixels_HWC.dtype}; only 8 bits per channel are supported")
        colors = 1 if self._is_gray or pixels_HWC.shape[2] < 3 else 3
        rgb_HWC: NDArray[np.uint8] = np.repeat(pixels_HWC[..., :colors], 3 // colors, axis=2)
        if self._has_alpha:
            alpha_HW = pixels_HWC[..., colors].astype(np.uint8, copy=False)
            if self._is_premultiplied:
                seen_HW = (alpha_HW > 0) & (alpha_HW < 255)
                rgb_HWC[seen_HW] = _without_alpha(rgb_HWC[seen_HW], alpha_HW[seen_HW])
            rgb_HWC[alpha_HW == 0] = 255
        return rgb_HWC

    def close(self) -> None:
        self._slide.close()

    def _tiled_images(self) -> tuple[TiledImage, ...]:
        properties = self._slide.properties
        if properties.get("tiffslide.series-composition"):
            return ()
        levels = self._slide.ts_tifffile.series[properties["tiffslide.series-index"]].levels
        images = [tiled_image(level) for level in levels]
        return tuple(image for image in images if image) if all(images) else ()

    def _confirm(self, level: int, tile_lv: Box) -> None:
        # imagecodecs ignores the warnings of libjpeg and fills missing pixels with gray; OpenSlide raises an error.
        with closing(OpenSlideReader(self._path)) as other:
            other.read(level, tile_lv)


def _openslide_tiles(slide: openslide.OpenSlide) -> Iterator[tuple[int, int]]:
    """Yield (width, height) of the tiles of each level, if OpenSlide has it as a property."""
    for level in range(slide.level_count):
        width, height = (slide.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height"))
        if width is not None and height is not None:
            yield int(width), int(height)


def _possible_levels(slide: tiffslide.TiffSlide) -> Iterator[tifffile.TiffPageSeries]:
    """Yield every image that may be a level."""
    index = None if slide.properties.get("tiffslide.series-composition") else slide.properties["tiffslide.series-index"]
    for number, series in enumerate(slide.ts_tifffile.series):
        if index in (None, number):
            yield from series.levels


def _tile_size(level: tifffile.TiffPageSeries) -> tuple[int, int]:
    """Return the width and height of the tiles or strips of an image."""
    page = level.keyframe
    return (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)


def _check_tile_bytes(levels: Iterable[tifffile.TiffPageSeries], file_size: int) -> None:
    """Raise ValueError if a tile or strip claims too many bytes, or is missing: zarr would return black pixels."""
    pages: Iterable[Any] = (page for level in levels for page in level.pages if page is not None)
    for page in pages:
        check_bytes(max(page.databytecounts, default=0), file_size)
        if min(page.databytecounts, default=1) == 0:
            raise ValueError("parts of the image are missing from the file; only tiles of 8-bit RGB may be missing")


def _channels(level: tifffile.TiffPageSeries) -> int:
    """Return the number of values per pixel of an image: samples of a page, or pages that the metadata joins."""
    return math.prod(size for size, axis in zip(level.shape, level.axes, strict=True) if axis not in "YX")


def _check_tiles(sizes: Iterable[tuple[int, int]]) -> None:
    for width, height in sizes:
        if width * height > LARGEST_TILE_PX:
            raise ValueError(f"its tiles have {width}×{height} pixels; at most {LARGEST_TILE_PX} can be decoded")


def _check_channels(channels: Iterable[int]) -> None:
    for count in channels:
        if count > MOST_CHANNELS:
            raise ValueError(f"its pixels have {count} channels; at most {MOST_CHANNELS} can be read")


def _has_alpha(level: tifffile.TiffPageSeries) -> bool:
    """Return whether the value after the colors of an image states how opaque a pixel is."""
    page: Any = level.keyframe  # the stubs also allow a frame, which has no tags of its own
    return page.extrasamples[:1] in [(tifffile.EXTRASAMPLE.ASSOCALPHA,), (tifffile.EXTRASAMPLE.UNASSALPHA,)]


def _is_premultiplied(level: tifffile.TiffPageSeries) -> bool:
    """Return whether the colors of an image with alpha are stored multiplied by it."""
    page: Any = level.keyframe
    return bool(page.extrasamples[0] == tifffile.EXTRASAMPLE.ASSOCALPHA)


def _without_alpha(rgb_NC: NDArray[np.uint8], alpha_N: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the colors of pixels whose colors were multiplied by their alpha, which is not 0."""
    return np.minimum(np.rint(rgb_NC * (255 / alpha_N[:, None])), 255).astype(np.uint8)


def _colors(level: tifffile.TiffPageSeries) -> str:
    """Return what the values of an image stand for, as tifffile names it."""
    page: Any = level.keyframe
    return tifffile.PHOTOMETRIC(page.photometric).name


def _check_colors(levels: Iterable[tifffile.TiffPageSeries]) -> None:
    """Raise ValueError unless tiffslide returns all levels as RGB, or as gray whose maximum is white.

    tiffslide returns all other values as they are, such as inverted gray or the indices of a palette.
    """
    for level in levels:
        page: Any = level.keyframe
        colors = _colors(level)
        # Only these decoders convert YCbCr to RGB.
        if colors not in _COLORS or (colors == "YCBCR" and page.compression not in JPEG + JPEG_2000):
            raise ValueError(f"its colors are stored as {colors}; use RGB, MINISBLACK, or YCBCR in JPEG or JPEG 2000")


_COLORS = ("RGB", "MINISBLACK", "YCBCR")
"""The last one in JPEG and JPEG 2000."""


READERS: dict[BackendName, Callable[[Path], Reader]] = {"openslide": OpenSlideReader, "tiffslide": TiffSlideReader}
"""All readers by name, in the order in which they are tried. Each raises an error for a file that it cannot open."""


def reader_versions() -> dict[str, str]:
    """Return the versions of the libraries that read slides."""
    return {
        "openslide": str(openslide.__library_version__),
        "openslide-python": version("openslide-python"),
        "tiffslide": version("tiffslide"),
        "tifffile": version("tifffile"),
        "imagecodecs": version("imagecodecs"),
    }


def slide_suffixes() -> frozenset[str]:
    """Return the file name endings that a folder is searched for: those of all readers, in lower case."""
    return frozenset().union(*(getattr(reader, "suffixes", ()) for reader in READERS.values()))
