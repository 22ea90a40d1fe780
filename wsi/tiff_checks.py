"""Find what libraries read wrongly without an error, or crash at, in the tags of a TIFF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tifffile

from wsi.errors import SlideFormatError
from wsi.tiff_tiles import JPEG, JPEG_2000

MOST_TILE_BYTES = 1 << 28
"""Bytes of the largest compressed tile or strip that is read: 256 MiB, the decoded size of the largest tile."""

_TURNED = range(2, 9)
"""Values of Orientation other than 1, upright. libtiff ignores values outside the standard, such as 0."""


@dataclass(frozen=True)
class _Tags:
    """What the images of a TIFF claim."""

    orientations: frozenset[int] = frozenset()
    """Of the levels that libtiff decodes. OpenSlide decodes JPEG and JPEG 2000 itself and ignores the tag."""
    has_16_bit_gray: bool = False
    """Whether a level is 16-bit gray."""
    most_bytes: int = 0
    """Bytes of the largest tile of any image."""


def check_layout(path: Path) -> None:
    """Raise SlideFormatError if a library would return wrong pixels for a TIFF file. Accept any other file.

    If libtiff decodes the tiles, OpenSlide rotates or mirrors each one as the tag Orientation demands, but does not
    move it. In 16-bit gray, OpenSlide returns black parts in the tiles at the right edge.
    """
    tags = _file_tags(path)
    turned = sorted(tags.orientations.intersection(_TURNED))
    if turned:
        raise SlideFormatError(
            f"{path.name}: its pixels are stored rotated or mirrored (Orientation {turned[0]}); save it with "
            f"Orientation 1"
        )
    if tags.has_16_bit_gray:
        raise SlideFormatError(f"{path.name}: its pixels are 16-bit gray; convert it to 8 bits per channel")


def check_tile_bytes(path: Path) -> None:
    """Raise ValueError if a tile claims more bytes than the file has, or more than `MOST_TILE_BYTES`.

    OpenSlide allocates these bytes before it reads them, and aborts the process if it cannot.
    """
    check_bytes(_file_tags(path).most_bytes, path.stat().st_size)


def check_bytes(claimed: int, file_size: int) -> None:
    """Raise ValueError if a tile cannot have as many bytes as it claims."""
    most = min(file_size, MOST_TILE_BYTES)
    if claimed > most:
        raise ValueError(f"a tile claims {claimed:,} bytes; at most {most:,} can be read")


def _file_tags(path: Path) -> _Tags:
    facts = path.stat()
    return _read(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, size: int, mtime_ns: int) -> _Tags:  # noqa: ARG001 - the key of the cache
    # Cached, because every thread opens the file, and again after each read error.
    try:
        with tifffile.TiffFile(path) as tiff:
            # OpenSlide reads NDPI, whose images are strips, with code of its own.
            pages = [] if tiff.is_ndpi else list(_pages(tiff))
            levels = [page for n, page in enumerate(pages) if n == 0 or (page.is_tiled and page.is_reduced)]
            return _Tags(
                orientations=frozenset(
                    int(page.tags.valueof(274, default=1))
                    for page in levels
                    if page.compression not in (*JPEG, *JPEG_2000)
                ),
                has_16_bit_gray=any(page.photometric == 1 and page.bitspersample == 16 for page in levels),
                most_bytes=max((max(page.databytecounts, default=0) for page in pages if page.is_tiled), default=0),
            )
    except (OSError, MemoryError):
        raise  # the next attempt may succeed
    except Exception:  # noqa: BLE001 - not a TIFF, or damaged in any way: the libraries state what is wrong
        return _Tags()


def _pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    seen: set[int] = set()
    for page in tiff.pages:
        if page.offset in seen:
            return  # directories that go back to themselves
        seen.add(page.offset)
        if isinstance(page, tifffile.TiffPage):
            yield page
