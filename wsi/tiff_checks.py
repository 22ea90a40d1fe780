"""Find what libraries read wrongly without an error, or crash at, in the tags of a TIFF file."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree as ET

import tifffile

from wsi.errors import SlideFormatError
from wsi.tiff_tiles import JPEG, JPEG_2000

MOST_TILE_BYTES = 1 << 28
"""Bytes of the largest compressed tile or strip that is read: 256 MiB, the decoded size of the largest tile."""

_TURNED = range(2, 9)
"""Values of Orientation other than 1, upright. libtiff ignores values outside the standard, such as 0."""

_MACRO = 8
"""Bit of NewSubfileType that marks a picture of the whole glass in files of Aperio."""

_MOST_DIRECTORIES = 4096
"""Longer chains of directories are not followed to their end."""

_PICTURE = re.compile(
    r"(?:Aperio[^\r\n]*[\r\n]+)?\s*(?:label|macro)(?:[ _]image)?(?:\s*$|\s+\d+x\d+|\s+-offset|\s*\|)", re.IGNORECASE
)
"""Beginning of the description of a picture of the label or of the whole glass: "label 387x463" after Aperio's first
line, "Macro", "Label_Image", "Macro -offset=(0,0)"."""


@dataclass(frozen=True)
class _Layout:
    """How an image of a TIFF stores its pixels."""

    size: tuple[int, int]
    is_marked: bool
    """Whether the image is the first one or is marked as a smaller level. Levels of Aperio need not be marked."""
    orientation: int
    """1 for JPEG and JPEG 2000: OpenSlide decodes them itself and ignores the tag."""
    is_16_bit_gray: bool


@dataclass(frozen=True)
class _Tags:
    """What the images of a TIFF claim."""

    layouts: tuple[_Layout, ...] = ()
    """Of the first image and all others in tiles."""
    most_bytes: int = 0
    """Bytes of the largest tile of any image."""
    picture_sizes: frozenset[tuple[int, int]] = frozenset()
    """(width, height) of the images that are named or marked as a picture of the label or of the whole glass."""
    tiled_picture_sizes: frozenset[tuple[int, int]] = frozenset()
    """The same without the images that are stored in strips."""
    ends_early: bool = False
    """Whether the directory of an image lies beyond the end of the file, in whole or in part."""


def check_layout(path: Path, level_sizes: Collection[tuple[int, int]]) -> None:
    """Raise SlideFormatError if a library would return wrong pixels for a TIFF file, or not all of its levels.

    Accept any other file.

    `level_sizes`: the sizes of the levels that the library found. Other images are not checked, such as a label.

    If libtiff decodes the tiles, OpenSlide rotates or mirrors each one as the tag Orientation demands, but does not
    move it. In 16-bit gray, OpenSlide returns black parts in the tiles at the right edge.
    """
    tags = _file_tags(path)
    if tags.ends_early:
        raise SlideFormatError(
            f"{path.name}: the file ends before its last image; a copy may still be running: run the same command "
            f"again when the copy is complete, or copy the slide again"
        )
    levels = [image for image in tags.layouts if image.is_marked or image.size in level_sizes]
    turned = sorted(level.orientation for level in levels if level.orientation in _TURNED)
    if turned:
        raise SlideFormatError(
            f"{path.name}: its pixels are stored rotated or mirrored (Orientation {turned[0]}); save it with "
            f"Orientation 1"
        )
    if any(level.is_16_bit_gray for level in levels):
        raise SlideFormatError(f"{path.name}: its pixels are 16-bit gray; convert it to 8 bits per channel")


def picture_sizes(path: Path, *, in_strips: bool = True) -> frozenset[tuple[int, int]]:
    """Return (width, height) of the images of a TIFF file that show the label or the whole glass.

    The image's description, its NewSubfileType or its name in OME-XML states what it shows. Without `in_strips`, images
    that are stored in strips are left out. Return an empty set for any other file.
    """
    tags = _file_tags(path)
    return tags.picture_sizes if in_strips else tags.tiled_picture_sizes


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
            ends_early = _ends_early(tiff)
            # OpenSlide reads NDPI, whose images are strips, with code of its own.
            pages = [] if tiff.is_ndpi or ends_early else list(_pages(tiff))
            return _Tags(
                ends_early=ends_early,
                layouts=tuple(_layout(page, n == 0) for n, page in enumerate(pages) if n == 0 or page.is_tiled),
                most_bytes=max((max(page.databytecounts, default=0) for page in pages if page.is_tiled), default=0),
                picture_sizes=frozenset(_picture_sizes(pages, in_strips=True)),
                tiled_picture_sizes=frozenset(_picture_sizes(pages, in_strips=False)),
            )
    except (OSError, MemoryError):
        raise  # the next attempt may succeed
    except Exception:  # noqa: BLE001 - not a TIFF, or damaged in any way: the libraries state what is wrong
        return _Tags()


def _ends_early(tiff: tifffile.TiffFile) -> bool:
    """Return whether the chain of directories leads beyond the end of the file. tiffslide ignores the rest of it."""
    file, size, form = tiff.filehandle, tiff.filehandle.size, tiff.tiff
    offset, seen = tiff.pages.first.offset, set[int]()
    while offset and offset not in seen and len(seen) < _MOST_DIRECTORIES:
        seen.add(offset)
        if offset + form.tagnosize > size:
            return True
        file.seek(offset)
        (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
        end = offset + form.tagnosize + count * form.tagsize
        if end > size:
            return True
        file.seek(end)
        following = file.read(form.offsetsize)
        if len(following) < form.offsetsize:
            return False  # libtiff takes this as the end of the chain
        (offset,) = struct.unpack(form.offsetformat, following)
    return False


def _layout(page: tifffile.TiffPage, is_first: bool) -> _Layout:
    ignores_orientation = page.compression in (*JPEG, *JPEG_2000)
    return _Layout(
        size=(page.imagewidth, page.imagelength),
        is_marked=is_first or bool(page.is_reduced),
        orientation=1 if ignores_orientation else int(page.tags.valueof(274, default=1)),
        is_16_bit_gray=page.photometric == 1 and page.bitspersample == 16,
    )


def _picture_sizes(pages: list[tifffile.TiffPage], *, in_strips: bool) -> Iterator[tuple[int, int]]:
    for page in pages:
        if (in_strips or page.is_tiled) and (page.subfiletype & _MACRO or _PICTURE.match(page.description)):
            yield page.imagewidth, page.imagelength
    if pages and pages[0].is_ome:
        yield from _ome_picture_sizes(pages[0].description)


def _ome_picture_sizes(xml: str) -> list[tuple[int, int]]:
    """Return the sizes that OME-XML states for the images that it names as such a picture."""
    try:
        root = ET.fromstring(xml)  # noqa: S314 - tifffile parses it too
        return [
            (int(pixels.get("SizeX", "")), int(pixels.get("SizeY", "")))
            for image in root.iterfind("{*}Image")
            if _PICTURE.match(image.get("Name", ""))
            for pixels in image.iterfind("{*}Pixels")
        ]
    except (ET.ParseError, ValueError):
        return []


def _pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    seen: set[int] = set()
    for page in tiff.pages:
        if page.offset in seen:
            return  # directories that go back to themselves
        seen.add(page.offset)
        if isinstance(page, tifffile.TiffPage):
            yield page
