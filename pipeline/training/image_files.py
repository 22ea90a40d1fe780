"""Find the files of images, and read those of images and masks with Pillow. Files that Pillow would read with other
values are refused.

Shape suffixes: H and W the image, C color channels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Container
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.errors import DatasetFileError, MaskError, UnreadableImageError
from wsi.tiff_tiles import jpeg_2000_bits

# Exceptions of Pillow's decoders for damaged files.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_BITS_PER_SAMPLE = 258
"""Tag of a TIFF."""


def matching_files(root: Path, pattern: str, skip: Container[str] = ()) -> list[Path]:
    """Return the files that match a pattern, sorted. If none does, its umlauts may be composed in another way.

    Files whose names without the ending are in `skip` are left out.

    Raises DatasetFileError for an invalid pattern.
    """
    for form in spellings(pattern):
        try:
            found = [file for file in root.glob(form) if file.stem not in skip]
            # Some systems leave hidden files beside the images.
            files = [file for file in found if not file.name.startswith(".") and file.is_file()]
        except (ValueError, NotImplementedError, OSError) as error:  # OSError: the pattern is too long for a file name
            raise DatasetFileError(f"{root}: {pattern!r} is not a valid pattern for images: {error}") from error
        if files:
            return sorted(files, key=lambda file: file.parts)  # paths themselves compare four times as slowly
    return []


def spellings(path: str) -> list[str]:
    """Return a path as it is, and with its umlauts composed and decomposed: a Mac decomposes those of file names."""
    return list(dict.fromkeys((path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))))


def size_of(file: Path) -> tuple[int, int]:
    """Return (width, height) from the header of an image. Raises UnreadableImageError."""
    try:
        with Image.open(file) as image:
            return image.size
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(f"{file}: cannot be read: {error}") from error


def decoded(file: Path, mode: str | None) -> NDArray[np.uint8]:
    """Return the pixels of a file converted to `mode`, (H, W, C), or the values of a mask, (H, W), if `mode` is None.

    Transparent pixels of an image are white. Raises UnreadableImageError for an image with more than 8 bits per
    channel or that cannot be read, and MaskError for a mask that is not a palette or 8-bit gray image.
    """
    failed = UnreadableImageError if mode else MaskError
    try:
        with Image.open(file) as image:
            if mode is None and image.mode not in {"P", "L", "1"}:
                raise MaskError(
                    f"{file}: has mode {image.mode}; a mask must be a palette or 8-bit gray image of class values"
                )
            if image.mode.startswith(("I", "F")):
                raise UnreadableImageError(f"{file}: has mode {image.mode}; an image must have 8 bits per channel")
            if _has_deep_channels(image, file):
                raise UnreadableImageError(
                    f"{file}: has more than 8 bits per channel; convert the file to 8 bits per channel"
                )
            if mode is None:
                return np.asarray(image, dtype=np.uint8)
            if image.has_transparency_data:
                return _on_white(image)
            return np.asarray(image.convert(mode), dtype=np.uint8)
    except _DECODER_ERRORS as error:
        raise failed(f"{file}: cannot be read: {error}") from error


def _has_deep_channels(image: ImageFile.ImageFile, file: Path) -> bool:
    """Return whether the channels of a file have more than 8 bits, of which Pillow would keep the higher 8."""
    # Pillow reads the planes of a TIFF as 8-bit images, whatever their depth.
    in_tiff = isinstance(image, TiffImagePlugin.TiffImageFile) and max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "JPEG2000":
        return jpeg_2000_bits(file.read_bytes()) > 8
    if image.format == "PPM":
        # The raw mode and the largest value, or the raw mode alone.
        return any(isinstance(tile.args, tuple) and tile.args[1] > 255 for tile in image.tile)
    # "BGR;16" is a BMP whose pixels, not channels, have 16 bits.
    return in_tiff or any(";16" in str(tile.args).replace("BGR;16", "") for tile in image.tile)


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    """Return the RGB pixels of an image with transparency. Pixels of alpha 0 are white, whatever color they have."""
    rgba_HWC = np.asarray(image.convert("RGBA"), dtype=np.uint8)
    rgb_HWC = np.ascontiguousarray(rgba_HWC[..., :3])
    rgb_HWC[rgba_HWC[..., 3] == 0] = 255
    return rgb_HWC
