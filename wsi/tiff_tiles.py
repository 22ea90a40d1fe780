"""Decode the tiles of one TIFF image in the calling thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsi.box import Box

JPEG = (7, 33007)
JPEG_2000 = (33003, 33004, 33005, 34712)
_ZEROS = bytes(512)
"""An unwritten sector of a disk. Tiles of white glass contain up to 384 zeros in a row."""
_JPEG_2000_START = b"\xff\x4f\xff\x51"
"""The first marker of a JPEG 2000 stream, and the size marker, which follows it."""
_MOST_BEHIND_END = 64
"""Bytes after the end of a JPEG or JPEG 2000 stream that count as padding."""


@dataclass(frozen=True)
class TiledImage:
    """A TIFF image of 8-bit RGB tiles. Threads must not share it."""

    page: tifffile.TiffPage

    @property
    def tile_size(self) -> tuple[int, int]:
        """Return (width, height) of a tile."""
        return self.page.tilewidth, self.page.tilelength

    @property
    def is_whole(self) -> bool:
        """Return whether the file contains every tile."""
        return min(self.page.databytecounts) > 0

    def has_damage(self, index: int) -> bool:
        """Return whether a tile is a JPEG 2000 stream that looks damaged, which no decoder reports.

        Raises ValueError for a tile that is cut off.
        """
        return self.page.compression in JPEG_2000 and jpeg_2000_looks_damaged(self._stream(index))

    def read(self, box: Box, confirm: Callable[[Box], None]) -> NDArray[np.uint8]:
        """Return the pixels of a box inside the image, as rgb_HWC; a tile that is not in the file is white.

        `confirm` is called with the box of each tile whose JPEG stream looks damaged, cut at the image's edges. It
        raises an error if the tile is damaged. Raises the errors of the decoder, and ValueError for a tile that is cut
        off, claims another size, or for which `has_damage` is true.
        """
        rgb_HWC = np.empty((box.height, box.width, 3), np.uint8)
        width, height = self.tile_size
        image = Box(0, 0, self.page.imagewidth, self.page.imagelength)
        columns = -(-image.width // width)
        for row in range(box.y // height, -(-box.bottom // height)):
            for column in range(box.x // width, -(-box.right // width)):
                tile = Box(column * width, row * height, width, height)
                part = tile.intersect(box)
                tile_HWC = self._tile(row * columns + column, lambda t=tile: confirm(t.intersect(image)))  # type: ignore[misc]
                part_HWC = tile_HWC[part.y - tile.y : part.bottom - tile.y, part.x - tile.x : part.right - tile.x]
                rgb_HWC[part.y - box.y : part.bottom - box.y, part.x - box.x : part.right - box.x] = part_HWC
        return rgb_HWC

    def _tile(self, index: int, confirm: Callable[[], None]) -> NDArray[np.uint8]:
        page = self.page
        if page.databytecounts[index] == 0:
            return np.full((*self.tile_size[::-1], 3), 255, np.uint8)
        data = self._stream(index)
        self._check_size(index, data)
        if page.compression in JPEG and looks_damaged(data):
            confirm()
        # OpenSlide cannot confirm this damage: it decodes such a stream without an error.
        if page.compression in JPEG_2000 and jpeg_2000_looks_damaged(data):
            raise ValueError(f"the JPEG 2000 stream of tile {index} is cut off or overwritten")
        pixels = page.decode(data, index, jpegtables=page.jpegtables)[0]
        if pixels is None:
            raise ValueError(f"tile {index} is empty")
        return np.asarray(pixels[0], np.uint8)

    def _stream(self, index: int) -> bytes:
        page, count = self.page, self.page.databytecounts[index]
        file = page.parent.filehandle
        # Checked before the read, which allocates as many bytes as the file claims.
        if page.dataoffsets[index] + count > file.size:
            raise ValueError(f"the file ends in tile {index}")
        file.seek(page.dataoffsets[index])
        data: bytes = file.read(count)
        return data

    def _check_size(self, index: int, data: bytes) -> None:
        """Raise ValueError if the header of a tile claims a larger size, which its decoder would allocate.

        For other compressions tifffile decodes at most one tile.
        """
        if self.page.compression in JPEG:
            size = jpeg_size(data)
        elif self.page.compression in JPEG_2000:
            size = jpeg_2000_size(data)
        else:
            return
        if size is None or size[0] > self.tile_size[0] or size[1] > self.tile_size[1]:
            raise ValueError(f"tile {index} of {self.tile_size} pixels claims {size or 'no size'}")


def tiled_image(series: tifffile.TiffPageSeries) -> TiledImage | None:
    """Return the image of a level, or None if the level is not one TIFF image of 8-bit RGB tiles."""
    page = series.pages[0]
    if len(series.pages) != 1 or not isinstance(page, tifffile.TiffPage) or series.axes != "YXS":
        return None
    plain = page.is_tiled and page.planarconfig == 1 and page.dtype == np.uint8 and page.samplesperpixel == 3
    plain = plain and not page.extrasamples
    return TiledImage(page) if plain else None


def looks_damaged(jpeg: bytes) -> bool:
    """Return whether a JPEG stream may be cut off or overwritten. imagecodecs decodes such streams without an error.

    The stream looks damaged if its image data contain 512 zeros in a row or an unexpected marker, if the end is
    missing, or if more than padding follows the end. A good stream rarely looks damaged. A stream with a few wrong bits
    does not.
    """
    start = jpeg.find(b"\xff\xda")
    if start < 0 or jpeg.find(_ZEROS, start) >= 0:
        return True
    values = np.frombuffer(jpeg, np.uint8, offset=start + 2)
    places = np.flatnonzero(values[:-1] == 0xFF)
    codes = values[places + 1]
    # After FF, 0 encodes the byte FF, D0 to D7 are restarts, and a repeated FF is fill.
    markers = np.flatnonzero((codes != 0) & (codes != 0xFF) & ((codes < 0xD0) | (codes > 0xD7)))
    if not len(markers) or codes[markers[0]] != 0xD9:
        return True
    return bool(len(values) - (places[markers[0]] + 2) > _MOST_BEHIND_END)


def jpeg_2000_looks_damaged(data: bytes) -> bool:
    """Return whether a JPEG 2000 stream of an RGB tile is cut off or overwritten with zeros.

    The stream looks damaged if its end marker is missing, or if it contains 512 zeros in a row. Up to 64 bytes of
    padding may follow the end marker. Other wrong bytes are not detected.
    """
    start = data.find(b"\xff\x52\x00", data.find(_JPEG_2000_START))
    if start < 0 or b"\xff\xd9" not in data[start + 10 :][-2 - _MOST_BEHIND_END :]:
        return True
    # An empty packet is a zero byte. There is one packet for each quality layer, resolution and color, or many more if
    # the resolutions are split into precincts.
    layers, halvings = int.from_bytes(data[start + 6 : start + 8], "big"), data[start + 9]
    many_packets = data[start + 4] & 1 or layers * (halvings + 1) * 3 >= len(_ZEROS)
    return not many_packets and _ZEROS in data


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the frame header of a JPEG stream, or None if no header precedes the image data."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        code = data[at + 1]
        if code == 0xFF:  # fill before a marker
            at += 1
        elif 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif code == 0xDA:
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the size marker of a JPEG 2000 stream, or None if there is no marker."""
    start = data.find(_JPEG_2000_START)
    if start < 0 or len(data) < start + 24:
        return None
    right, bottom, left, top = (int.from_bytes(data[start + i : start + i + 4], "big") for i in (8, 12, 16, 20))
    return right - left, bottom - top


def jpeg_2000_bits(data: bytes) -> int:
    """Return the most bits of a channel from the size marker of a JPEG 2000 stream, or 0 if there is no marker."""
    start = data.find(_JPEG_2000_START)
    if start < 0:
        return 0
    channels = int.from_bytes(data[start + 40 : start + 42], "big")
    # The highest bit is the sign; each channel has three bytes.
    return max((1 + (depth & 0x7F) for depth in data[start + 42 : start + 42 + 3 * channels : 3]), default=0)
