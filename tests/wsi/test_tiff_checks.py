from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.slides import PINK, PURPLE, TILE, painted
from wsi.box import Box
from wsi.errors import SlideFormatError
from wsi.readers import OpenSlideReader, TiffSlideReader
from wsi.slide import Backend, open_slide

BACKENDS: tuple[Backend, ...] = ("auto", "openslide", "tiffslide")
TILED: dict[str, Any] = {"tile": (TILE, TILE), "metadata": None}
APERIO = "Aperio Image Library v11"


def with_byte_count(path: Path, index: int, count: int) -> Path:
    """Write another number of bytes for one tile or strip of the first image."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages.first.tags
        tag = tags["TileByteCounts"] if "TileByteCounts" in tags else tags["StripByteCounts"]
        counts = list(tag.value)
        counts[index] = count
        tag.overwrite(counts, dtype=16)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_slide_with_turned_pixels_is_refused(
    tmp_path: Path, backend: Backend, orientation: int, compression: str | None
) -> None:
    """OpenSlide would turn each tile in its place, and tiffslide would not turn the slide."""
    path = tmp_path / "slide.tif"
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(path, painted((256, 256)), photometric="rgb", compression=compression, extratags=tags, **TILED)
    with pytest.raises(
        SlideFormatError,
        match=rf"^slide\.tif: its pixels are stored rotated or mirrored \(Orientation {orientation}\); save it with "
        r"Orientation 1$",
    ):
        open_slide(path, 0.5, backend)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_upright_pixels_and_values_outside_the_standard_are_accepted(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "slide.tif"
    rgb_HWC = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    tifffile.imwrite(path, rgb_HWC, photometric="rgb", extratags=[(274, 3, 1, orientation, True)], **TILED)
    for backend in BACKENDS:
        with open_slide(path, 0.5, backend) as slide:
            np.testing.assert_array_equal(slide.read(0, Box(0, 0, 256, 256)).rgb_HWC, rgb_HWC)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("compression", ["jpeg", 33005])
def test_jpeg_tiles_are_read_as_stored_whatever_the_orientation(
    tmp_path: Path, orientation: int, compression: str | int
) -> None:
    """Both libraries decode JPEG and JPEG 2000 tiles without the tag. OpenSlide reads JPEG 2000 from Aperio only."""
    path = tmp_path / "slide.tif"
    rgb_HWC = painted((256, 256), ((0, 0, 128, 64), PINK))
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(
        path, rgb_HWC, photometric="rgb", compression=compression, description=APERIO, extratags=tags, **TILED
    )
    for backend in BACKENDS:
        with open_slide(path, 0.5, backend) as slide:
            found_HWC = slide.read(0, Box(0, 0, 256, 256)).rgb_HWC.astype(int)
            assert np.abs(found_HWC - rgb_HWC).mean() < 3


@pytest.mark.parametrize("tiling", [TILED, {"metadata": None}])
def test_a_turned_picture_beside_the_levels_does_not_matter(tmp_path: Path, tiling: dict[str, Any]) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(painted((256, 256)), photometric="rgb", **TILED)
        tiff.write(painted((64, 64)), photometric="rgb", extratags=[(274, 3, 1, 6, True)], **tiling)
        tiff.write(np.zeros((64, 64), np.uint16), photometric="minisblack", **tiling)
    with open_slide(path, 0.5) as slide:
        assert slide.info.level_sizes == ((256, 256),)


@pytest.mark.parametrize(("description", "subfiletype"), [(None, 1), (APERIO, 0)])
def test_a_turned_smaller_level_is_refused(tmp_path: Path, description: str | None, subfiletype: int) -> None:
    """Levels of Aperio need not be marked as reduced images."""
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(painted((512, 512)), photometric="rgb", description=description, **TILED)
        tags = [(274, 3, 1, 6, True)]
        tiff.write(painted((256, 256)), photometric="rgb", subfiletype=subfiletype, extratags=tags, **TILED)
    with pytest.raises(SlideFormatError, match="Orientation 6"):
        open_slide(path, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_gray_is_refused(tmp_path: Path, backend: Backend) -> None:
    """OpenSlide returns black parts in the tiles at the right edge."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.full((300, 300), 60_000, np.uint16), photometric="minisblack", **TILED)
    with pytest.raises(
        SlideFormatError, match=r"^slide\.tif: its pixels are 16-bit gray; convert it to 8 bits per channel$"
    ):
        open_slide(path, 0.5, backend)


def test_a_tile_that_claims_more_bytes_than_the_file_has_is_unreadable_and_does_not_end_the_process(
    tmp_path: Path,
) -> None:
    """OpenSlide aborts the process if it cannot allocate the bytes that a JPEG tile claims."""
    path = tmp_path / "slide.tif"
    pink_HWC = painted((640, 512), ((0, 0, 640, 512), PINK))
    tifffile.imwrite(path, pink_HWC, bigtiff=True, photometric="rgb", compression="jpeg", **TILED)
    with_byte_count(path, 6, 2**50)
    with pytest.raises(
        SlideFormatError, match=r"a tile claims 1,125,899,906,842,624 bytes; at most [\d,]+ can be read"
    ):
        open_slide(path, 0.5, "openslide")
    with open_slide(path, 0.5) as slide:
        assert slide.info.backend == "tiffslide"
        rgb_HWC, unreadable = slide.read(0, Box(0, 0, 640, 512))
    assert unreadable == (Box(0, 0, 256, 256),)
    assert (rgb_HWC[:256, :256] == 255).all()
    assert np.abs(rgb_HWC[256:].astype(int) - PINK).max() <= 3


@pytest.mark.parametrize("layout", [{"tile": (TILE, TILE)}, {"rowsperstrip": 64}])
def test_gray_pixels_that_claim_more_bytes_than_the_file_has_are_refused(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    """tiffslide would run out of memory, which would look like a fault of the machine."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, np.full((256, 256), 200, np.uint8), bigtiff=True, photometric="minisblack", **layout)
    with_byte_count(path, 1, 2**50)
    with pytest.raises(ValueError, match=r"a tile claims 1,125,899,906,842,624 bytes"):
        TiffSlideReader(path)


def test_a_changed_file_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, painted((256, 256)), bigtiff=True, photometric="rgb", **TILED)
    OpenSlideReader(path).close()
    with_byte_count(path, 1, 2**50)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="a tile claims"):
        OpenSlideReader(path)


def test_a_truncated_slide_is_read(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    rgb_HWC = np.random.default_rng(0).integers(0, 255, (1024, 2048, 3), dtype=np.uint8)
    tifffile.imwrite(path, rgb_HWC, photometric="rgb", **TILED)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[64]  # the first tile of the second half
    os.truncate(path, offset)
    with closing(OpenSlideReader(path)) as reader:
        np.testing.assert_array_equal(reader.read(0, Box(0, 0, 2048, 512)), rgb_HWC[:512])


def with_picture(path: Path, description: str, subfiletype: int = 1, picture_px: int = 128) -> Path:
    """Write an Aperio slide of 512×512 pixels, then a picture in tiles that is smaller but has the slide's shape."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(painted((512, 512)), photometric="rgb", description=APERIO, **TILED)
        tiff.write(painted((256, 256)), photometric="rgb", description=APERIO, subfiletype=1, **TILED)
        picture_HWC = painted((picture_px, picture_px), ((0, 0, picture_px, picture_px), PINK))
        tiff.write(picture_HWC, photometric="rgb", description=description, subfiletype=subfiletype, **TILED)
    return path


@pytest.mark.parametrize("backend", ["auto", "openslide"])
@pytest.mark.parametrize(
    ("description", "subfiletype"),
    [
        (f"{APERIO}\r\nlabel 128x128", 1),
        (f"{APERIO} \nmacro 128x128|", 0),
        ("Label", 1),
        ("Label_Image", 1),
        ("Macro -offset=(0,0)-pixelsize=(0.03,0.03)", 1),
        (APERIO, 9),
    ],
)
def test_a_picture_of_the_label_in_the_shape_of_the_slide_is_not_a_level(
    tmp_path: Path, backend: Backend, description: str, subfiletype: int
) -> None:
    """OpenSlide counts every image in tiles as a level of an Aperio slide."""
    path = with_picture(tmp_path / "slide.svs", description, subfiletype)
    with closing(OpenSlideReader(path)) as reader:
        assert reader.level_sizes == ((512, 512), (256, 256), (128, 128))
    with open_slide(path, 0.5, backend) as slide:
        assert slide.info.level_sizes == ((512, 512), (256, 256))
        assert slide.info.warnings == (
            "level 2 (128×128 px) has the size of a label or macro image; levels from 2 on are not used",
        )


@pytest.mark.parametrize("first", [APERIO, None])
@pytest.mark.parametrize(("description", "subfiletype"), [(f"{APERIO}\r\nlabel 256x256", 1), (APERIO, 9), ("Label", 1)])
def test_a_level_with_the_size_of_a_picture_in_strips_is_used(
    tmp_path: Path, first: str | None, description: str, subfiletype: int
) -> None:
    """OpenSlide never takes an image in strips as a level. tiffslide does."""
    path = tmp_path / "slide.tif"
    level_HWC = painted((256, 256), ((20, 40, 100, 60), PURPLE))
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(painted((512, 512)), photometric="rgb", description=first, **TILED)
        # A level before its picture, and one behind it.
        for side, is_picture in ((256, False), (256, True), (128, True), (128, False)):
            if is_picture:
                picture_HWC = painted((side, side), ((0, 0, side, side), PINK))
                facts: dict[str, Any] = {"description": description, "subfiletype": subfiletype, "metadata": None}
                tiff.write(picture_HWC, photometric="rgb", **facts)
            else:
                tiff.write(level_HWC[:side, :side], photometric="rgb", description=first, subfiletype=1, **TILED)
    for backend in ("auto", "openslide"):
        with open_slide(path, 0.5, backend) as slide:
            assert slide.info.level_sizes == ((512, 512), (256, 256), (128, 128))
            assert slide.info.warnings == ()
            for level, side in ((1, 256), (2, 128)):
                pixels_HWC = slide.read(level, Box(0, 0, side, side)).rgb_HWC
                np.testing.assert_array_equal(pixels_HWC, level_HWC[:side, :side])
    # tiffslide might have taken the picture.
    with open_slide(path, 0.5, "tiffslide") as slide:
        assert slide.info.level_sizes == ((512, 512),)


@pytest.mark.parametrize(
    "description", [APERIO, f"{APERIO}\r\n512x512 -> 128x128", "macrophages", "label-free", "labels"]
)
def test_a_smaller_level_whose_description_names_no_picture_is_used(tmp_path: Path, description: str) -> None:
    path = with_picture(tmp_path / "slide.svs", description)
    with open_slide(path, 0.5, "openslide") as slide:
        assert slide.info.level_sizes == ((512, 512), (256, 256), (128, 128))
        assert slide.info.warnings == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_ome", [False, True])
def test_a_slide_whose_first_image_is_a_picture_of_the_label_is_refused(
    tmp_path: Path, backend: Backend, is_ome: bool
) -> None:
    path = tmp_path / ("slide.ome.tif" if is_ome else "slide.tif")
    with tifffile.TiffWriter(path) as tiff:
        for name, side in (("label image", 256), ("slide", 512)):
            description: dict[str, Any] = {} if is_ome else {"description": name}
            metadata = {"axes": "YXS", "Name": name} if is_ome else None
            tiff.write(painted((side, side)), photometric="rgb", tile=(TILE, TILE), metadata=metadata, **description)
    with pytest.raises(
        SlideFormatError,
        match=r"^slide\.(ome\.)?tif: its first image is a label or macro image, or has the size of one; save the "
        r"slide without that image$",
    ):
        open_slide(path, 0.5, backend)


def test_a_level_with_the_size_of_a_picture_that_ome_xml_names_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(painted((512, 512)), photometric="rgb", tile=(TILE, TILE), metadata={"axes": "YXS", "Name": "a"})
        tiff.write(
            painted((128, 128)),
            photometric="rgb",
            tile=(TILE, TILE),
            subfiletype=1,
            metadata={"axes": "YXS", "Name": "Macro image"},
        )
    with open_slide(path, 0.5, "openslide") as slide:
        assert slide.info.level_sizes == ((512, 512),)


@pytest.mark.parametrize("xml", ["<OME><Image Name='label'><Pixels SizeX='x' SizeY='1'/></Image></OME>", "<OME</OME>"])
def test_damaged_ome_xml_switches_off_no_other_check(tmp_path: Path, xml: str) -> None:
    path = tmp_path / "slide.tif"
    tags = [(274, 3, 1, 6, True)]
    tifffile.imwrite(path, painted((256, 256)), photometric="rgb", description=xml, extratags=tags, **TILED)
    with pytest.raises(SlideFormatError, match="Orientation 6"):
        open_slide(path, 0.5)


@pytest.mark.parametrize("kind", [{}, {"bigtiff": True}, {"byteorder": ">"}], ids=["TIFF", "BigTIFF", "big-endian"])
def test_a_file_that_ends_before_its_last_image_is_refused_until_its_copy_is_complete(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    whole, path = tmp_path / "whole.tif", tmp_path / "copy.tif"
    with tifffile.TiffWriter(whole, **kind) as file:
        for size in (512, 256, 128):
            file.write(painted((size, size)), photometric="rgb", subfiletype=int(size < 512), **TILED)
    with tifffile.TiffFile(whole) as tiff:
        others = [page.offset for page in tiff.pages][1:]
    content = whole.read_bytes()
    # Cut before a directory, in its count of tags, and in its tags, which tiffslide itself refuses.
    for length, cut in [(offset + more, more > 0) for offset in others for more in (0, 1, 40)]:
        path.write_bytes(content[:length])
        reason = "(cannot be opened as a slide|the file ends)" if cut else "the file ends before its last image; a copy"
        with pytest.raises(SlideFormatError, match=rf"^copy\.tif: {reason}"):
            open_slide(path, 0.5, "tiffslide")
        with pytest.raises(SlideFormatError):
            open_slide(path, 0.5)
    path.write_bytes(content)
    for backend in ("auto", "tiffslide"):  # OpenSlide opens no big-endian file
        with open_slide(path, 0.5, backend) as slide:
            assert slide.info.size_l0 == (512, 512)


@pytest.mark.full
def test_a_real_slide_that_is_cut_is_refused_and_whole_ones_are_not(tmp_path: Path, shared_slides: Path) -> None:
    for name in ("CMU-1-Small-Region.svs", "CMU-1.svs", "TCGA-CR-7395-01A-01-TS1.svs"):
        with open_slide(shared_slides / name, 0.5):
            pass
    path = tmp_path / "cut.svs"
    path.write_bytes((shared_slides / "CMU-1-Small-Region.svs").read_bytes()[:1_500_000])
    with pytest.raises(SlideFormatError, match=r"^cut\.svs: the file ends before its last image"):
        open_slide(path)
