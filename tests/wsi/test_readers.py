from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.slides import PINK, PURPLE, TILE, painted, write_slide
from wsi.box import Box
from wsi.errors import SlideFormatError
from wsi.readers import READERS, BackendName, OpenSlideReader, TiffSlideReader
from wsi.slide import Backend, open_slide
from wsi.tiff_tiles import jpeg_2000_looks_damaged, looks_damaged

APERIO = "Aperio Image Library v11.2.1 \r\n1x1|MPP = 0.5"


def noise(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)


def write_levels(path: Path, levels_HWC: list[NDArray[np.uint8]], description: str = APERIO) -> Path:
    """Write a pyramid whose levels may have any sizes and pixels."""
    with tifffile.TiffWriter(path) as tiff:
        for number, level_HWC in enumerate(levels_HWC):
            if number == 1 and description == APERIO:  # the thumbnail
                tiff.write(level_HWC[:1, :1], photometric="rgb", description=description, metadata=None)
            tiff.write(
                level_HWC,
                tile=(16, 16),
                photometric="rgb",
                compression="adobe_deflate",
                description=description,
                metadata=None,
                subfiletype=int(number > 0 and description != APERIO),
            )
    return path


@settings(max_examples=40)
@given(st.integers(200, 460), st.integers(180, 330), st.floats(1.9, 4.2), st.data())
def test_tiffslide_returns_the_pixels_of_a_level_at_any_downsample(
    width: int, height: int, downsample: float, data: st.DataObject
) -> None:
    size_lv = (round(width / downsample), int(height / downsample))
    levels_HWC = [noise((width, height)), noise(size_lv, 1)]
    x, y = (data.draw(st.integers(0, length - 1)) for length in size_lv)
    box = Box(x, y, *(data.draw(st.integers(1, n - start)) for n, start in zip(size_lv, (x, y), strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        path = write_levels(Path(folder) / "slide.svs", levels_HWC)
        with closing(TiffSlideReader(path)) as reader:
            assert reader.level_sizes == ((width, height), size_lv)
            found_HWC = reader.read(1, box)
    np.testing.assert_array_equal(found_HWC, levels_HWC[1][y : box.bottom, x : box.right])


def test_tiffslide_returns_the_pixels_of_a_level_through_zarr_too(tmp_path: Path) -> None:
    """A gray slide is not decoded tile by tile."""
    gray_HW = noise((460, 330))[..., 0]
    small_HW = noise((115, 83), 1)[..., 0]  # 4 and 3.98 times smaller
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        for number, level_HW in enumerate((gray_HW, small_HW)):
            tiff.write(level_HW, tile=(16, 16), subfiletype=number, metadata=None)
    with closing(TiffSlideReader(tmp_path / "slide.tif")) as reader:
        assert not reader.images
        for x in range(100):
            found_HWC = reader.read(1, Box(x, 30, 9, 20))
            np.testing.assert_array_equal(found_HWC, np.repeat(small_HW[30:50, x : x + 9, None], 3, axis=2))


def test_auto_reads_with_tiffslide_if_both_return_the_same_pixels(sample_slide: Path) -> None:
    with open_slide(sample_slide) as auto, open_slide(sample_slide, backend="openslide") as slow:
        assert (auto.info.backend, slow.info.backend) == ("tiffslide", "openslide")
        assert (auto.info.vendor, auto.info.mpp, auto.info.level_sizes) == ("aperio", 0.499, slow.info.level_sizes)
        box = Box(0, 0, *auto.info.size_l0)
        np.testing.assert_array_equal(auto.read(0, box).rgb_HWC, slow.read(0, box).rgb_HWC)


def test_auto_reads_jpeg_2000_and_odd_downsamples_with_tiffslide(shared_slides: Path) -> None:
    path = shared_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path, 0.25) as auto, open_slide(path, 0.25, "openslide") as slow:
        assert auto.info.backend == "tiffslide"
        box = Box(1000, 700, 600, 500)
        np.testing.assert_array_equal(auto.read(0, box).rgb_HWC, slow.read(0, box).rgb_HWC)


def test_auto_reads_a_plain_tiff_with_tiffslide_and_its_properties_with_openslide(tmp_path: Path) -> None:
    path = write_levels(tmp_path / "slide.tif", [noise((300, 200)), noise((150, 100))], description="")
    with open_slide(path, 0.5) as slide:
        assert (slide.info.backend, slide.info.vendor) == ("tiffslide", "generic-tiff")


class _Shifted(OpenSlideReader):
    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        return super().read(level, box_lv.shift(-1 if box_lv.x else 1, 0))


class _Brighter(OpenSlideReader):
    def read(self, level: int, box_lv: Box) -> NDArray[np.uint8]:
        return np.minimum(super().read(level, box_lv), 250) + np.uint8(3)


class _OtherSizes(OpenSlideReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.level_sizes = ((500, 299), *self.level_sizes[1:])


class _OneBound(OpenSlideReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.properties = {**self.properties, "openslide.bounds-x": "0"}


class _OtherVendor(OpenSlideReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.properties = {**self.properties, "openslide.vendor": "ventana"}


@pytest.mark.parametrize("other", [_Shifted, _Brighter, _OtherSizes, _OneBound, _OtherVendor])
def test_auto_reads_with_openslide_if_the_libraries_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: type[OpenSlideReader]
) -> None:
    path = write_slide(tmp_path / "slide.svs", noise((500, 300)), levels=(1, 2))
    with open_slide(path) as slide:
        assert slide.info.backend == "tiffslide"
    monkeypatch.setitem(READERS, "openslide", other)
    with open_slide(path) as slide:
        assert slide.info.backend == "openslide"


def without_tile(path: Path, index: int) -> Path:
    """Remove the bytes of one tile of level 0, as scanners do for areas that they did not scan."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        counts = list(tag.value)
        counts[index] = 0
        tag.overwrite(counts)
    return path


def test_auto_reads_slides_with_missing_tiles_with_openslide_and_tiffslide_returns_white(tmp_path: Path) -> None:
    path = without_tile(write_slide(tmp_path / "slide.svs", noise((500, 300))), 5)  # the second of the second row
    with open_slide(path) as slide:
        assert slide.info.backend == "openslide"
    with open_slide(path, backend="tiffslide") as slide:
        rgb_HWC, unreadable = slide.read(0, Box(0, 0, 500, 300))
    expected_HWC = noise((500, 300))
    expected_HWC[TILE : 2 * TILE, TILE : 2 * TILE] = 255
    np.testing.assert_array_equal(rgb_HWC, expected_HWC)
    assert unreadable == ()


@pytest.mark.parametrize("backend", ["auto", "openslide", "tiffslide"])
def test_a_slide_opens_if_its_center_and_corners_were_not_scanned(tmp_path: Path, backend: Backend) -> None:
    """These are the places where `open_slide` decodes one pixel."""
    path = write_slide(tmp_path / "slide.svs", painted((7 * TILE, 5 * TILE), ((0, 0, 900, 700), PINK)))
    for index in (0, 6, 17, 28, 34):
        without_tile(path, index)
    with open_slide(path, backend=backend) as slide:
        for x, y in ((0, 0), (3 * TILE, 2 * TILE)):
            assert slide.read(0, Box(x, y, 1, 1)).rgb_HWC.tolist() == [[[255, 255, 255]]]
        assert slide.read(0, Box(TILE, 0, 1, 1)).rgb_HWC.tolist() == [[list(PINK)]]


@pytest.mark.parametrize("backend", ["auto", "tiffslide"])
def test_a_slide_with_missing_strips_is_refused_because_tiffslide_would_return_black(
    tmp_path: Path, backend: Backend
) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, painted((256, 256)), photometric="rgb", rowsperstrip=64, metadata=None)
    with open_slide(path, 0.5, backend) as slide:
        assert slide.info.backend == "tiffslide"
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["StripByteCounts"]
        tag.overwrite([*tag.value[:-1], 0])
    with pytest.raises(SlideFormatError, match=r"slide\.tif: .*tiffslide: parts of the image are missing"):
        open_slide(path, 0.5, backend)


def test_a_name_with_two_colons_is_not_the_name_of_another_file(tmp_path: Path) -> None:
    write_slide(tmp_path / "case1", painted((256, 256), ((0, 0, 256, 256), PURPLE)))
    path = write_slide(tmp_path / "case1::b.svs", painted((256, 256), ((0, 0, 256, 256), PINK)))
    with open_slide(path) as slide:
        assert slide.info.backend == "openslide"
        assert slide.read(0, Box(5, 5, 1, 1)).rgb_HWC.tolist() == [[list(PINK)]]
    with pytest.raises(
        SlideFormatError, match=r'^case1::b\.svs: .*the path contains "::", which tiffslide cannot read'
    ):
        open_slide(path, backend="tiffslide")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
    "a sector of zeros": lambda data: data[:3000] + bytes(1024) + data[4024:],
    "ones at the end": lambda data: data[: len(data) // 2].ljust(len(data), b"\xff"),
    "an early end": lambda data: (data[: len(data) // 2] + b"\xff\xd9").ljust(len(data), b"\0"),
    "other bytes": lambda data: data[:3000] + np.random.default_rng(0).bytes(2048) + data[5048:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_jpeg_is_unreadable_in_both_libraries(sample_slide: Path, tmp_path: Path, name: str) -> None:
    """libjpeg only warns about most damage and fills the tile with gray, which must not count as tissue."""
    path = tmp_path / "slide.svs"
    shutil.copyfile(sample_slide, path)
    with closing(TiffSlideReader(sample_slide)) as reader:
        page = reader.images[0].page
        offset, count, width = page.dataoffsets[44], page.databytecounts[44], page.tilewidth
        columns = -(-page.imagewidth // width)
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(DAMAGE[name](data))
    tile = Box(44 % columns * width, 44 // columns * width, width, width)
    backends: tuple[Backend, ...] = ("auto", "openslide", "tiffslide")
    for backend in backends:
        with open_slide(path, backend=backend) as slide:
            assert backend != "auto" or slide.info.backend == "tiffslide"
            rgb_HWC, unreadable = slide.read(0, tile)
            assert unreadable == (tile,)
            assert (rgb_HWC == 255).all()
            assert slide.read(0, tile.shift(width, 0)).unreadable_lv == ()


def test_no_tile_of_a_good_slide_looks_damaged(sample_slide: Path) -> None:
    with closing(TiffSlideReader(sample_slide)) as reader, sample_slide.open("rb") as file:
        page = reader.images[0].page
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            assert not looks_damaged(file.read(count))


JPEG_2000_DAMAGE = {name: damage for name, damage in DAMAGE.items() if name != "other bytes"}
"""Without the damage that is not detected."""


@pytest.mark.parametrize("name", JPEG_2000_DAMAGE)
@pytest.mark.parametrize("place", ["most bytes", "middle", "another"])
def test_damaged_jpeg_2000_is_unreadable(shared_slides: Path, tmp_path: Path, name: str, place: str) -> None:
    """No decoder reports the damage. The first two tiles are those in which the libraries are compared."""
    good, path = shared_slides / "TCGA-CR-7395-01A-01-TS1.svs", tmp_path / "slide.svs"
    path.write_bytes(good.read_bytes())
    with closing(TiffSlideReader(good)) as reader:
        page = reader.images[0].page
        columns, rows = -(-page.imagewidth // 256), -(-page.imagelength // 256)
        by_bytes = np.argsort(page.databytecounts)
        index = int({"most bytes": by_bytes[-1], "middle": rows // 2 * columns + columns // 2}.get(place, by_bytes[-9]))
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(JPEG_2000_DAMAGE[name](data))
    tile = Box(index % columns * 256, index // columns * 256, 256, 256)
    backends: tuple[Backend, ...] = ("auto", "tiffslide")
    for backend in backends:
        with open_slide(path, 0.25, backend) as slide:
            assert slide.info.backend == "tiffslide"
            rgb_HWC, unreadable = slide.read(0, tile)
            assert unreadable == (tile,)
            assert (rgb_HWC == 255).all()
            assert slide.read(0, tile.shift(256, 0)).unreadable_lv == ()


def test_no_tile_of_a_good_jpeg_2000_slide_looks_damaged(shared_slides: Path) -> None:
    with closing(TiffSlideReader(shared_slides / "TCGA-CR-7395-01A-01-TS1.svs")) as reader:
        for image in reader.images:
            assert not any(map(image.has_damage, range(len(image.page.databytecounts))))


@pytest.mark.parametrize("form", ["j2k", "jp2"])
def test_good_jpeg_2000_does_not_look_damaged(form: Literal["j2k", "jp2"]) -> None:
    for pixels_HWC in (noise((256, 256)), np.full((1024, 1024, 3), 255, np.uint8)):
        for level in (None, 40):
            stream = bytes(imagecodecs.jpeg2k_encode(pixels_HWC, level, codecformat=form))
            assert not jpeg_2000_looks_damaged(stream)
            assert not jpeg_2000_looks_damaged(stream + bytes(64))
            assert jpeg_2000_looks_damaged(stream + bytes(65))
            assert jpeg_2000_looks_damaged(stream[:-1])
    for length in range(200):
        assert jpeg_2000_looks_damaged(stream[:length])


def test_empty_packets_of_jpeg_2000_are_not_damage() -> None:
    """A white tile can have thousands of empty packets, each a zero byte, if it has many layers or precincts."""
    stream = bytes(imagecodecs.jpeg2k_encode(noise((64, 64)), codecformat="j2k"))
    empty = stream[:-2] + bytes(600) + stream[-2:]
    assert jpeg_2000_looks_damaged(empty)
    start = stream.find(b"\xff\x52")
    for at, value in ((start + 4, 1), (start + 7, 60)):  # precincts; 60 layers of 4 resolutions and 3 colors
        assert not jpeg_2000_looks_damaged(empty[:at] + bytes([value]) + empty[at + 1 :])


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_a_requested_backend_is_used(sample_slide: Path, backend: BackendName) -> None:
    with open_slide(sample_slide, backend=backend) as slide:
        assert slide.info.backend == backend


@pytest.mark.parametrize(("channels", "readable"), [(16, True), (17, False)])
def test_a_file_that_claims_too_many_channels_is_refused_before_it_is_decoded(
    tmp_path: Path, channels: int, readable: bool
) -> None:
    """The fuzzer found a file with 51,712 channels, for which a read needed 12.8 GiB."""
    file = tmp_path / "many.tif"
    pixels_HWC = np.full((64, 64, channels), 200, np.uint8)
    tifffile.imwrite(file, pixels_HWC, tile=(64, 64), photometric="minisblack", planarconfig="contig")
    if readable:
        with closing(TiffSlideReader(file)) as reader:
            assert reader.read(0, Box(0, 0, 8, 8)).tolist() == [[[200] * 3] * 8] * 8
    else:
        with pytest.raises(ValueError, match="its pixels have 17 channels; at most 16 can be read"):
            TiffSlideReader(file)


@pytest.mark.parametrize("rowsperstrip", [None, 16])
@pytest.mark.parametrize("opaque", [1, 2])
def test_gray_and_transparent_pixels_are_read(tmp_path: Path, opaque: int, rowsperstrip: int | None) -> None:
    """`opaque` is the kind of alpha: colors multiplied by it (1), or not. A pixel with an alpha of 0 is white."""
    layout: dict[str, Any] = {"tile": (64, 64)} if rowsperstrip is None else {"rowsperstrip": rowsperstrip}
    for colors in (1, 3):
        pixels_HWC = np.full((64, 64, colors + 1), 100, np.uint8)
        pixels_HWC[..., colors] = 128
        pixels_HWC[:8] = 0
        photometric = "rgb" if colors == 3 else "minisblack"
        file = tmp_path / f"{colors}.tif"
        tifffile.imwrite(
            file, pixels_HWC, photometric=photometric, planarconfig="contig", extrasamples=[opaque], **layout
        )
        with closing(TiffSlideReader(file)) as reader:
            found_HWC = reader.read(0, Box(3, 4, 8, 8))
        assert found_HWC.dtype == np.uint8
        assert (found_HWC[:4] == 255).all()
        assert (found_HWC[4:] == (199 if opaque == 1 else 100)).all()  # 100 · 255 / 128
        assert found_HWC.shape == (8, 8, 3)


def test_colors_that_were_multiplied_by_alpha_are_those_of_the_slide(tmp_path: Path) -> None:
    """Colors brighter than their alpha, which no correct file has, become white and do not overflow."""
    pixels_HWC = np.zeros((64, 64, 4), np.uint8)
    pixels_HWC[0, :4] = [(10, 20, 30, 255), (60, 30, 0, 60), (200, 10, 5, 100), (1, 0, 1, 1)]
    file = tmp_path / "slide.tif"
    tifffile.imwrite(file, pixels_HWC, photometric="rgb", extrasamples=["assocalpha"], tile=(64, 64))
    with closing(TiffSlideReader(file)) as reader:
        found_HWC = reader.read(0, Box(0, 0, 5, 1))
    assert found_HWC.tolist() == [[[10, 20, 30], [255, 128, 0], [255, 26, 13], [255, 0, 255], [255, 255, 255]]]


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}])
def test_gray_with_alpha_and_another_value_is_gray(tmp_path: Path, layout: dict[str, Any]) -> None:
    pixels_HWC = np.tile(np.array([90, 255, 7], np.uint8), (64, 64, 1))
    pixels_HWC[:8, :, 1] = 0
    kinds = ["unassalpha", "unspecified"]
    file = tmp_path / "slide.tif"
    tifffile.imwrite(file, pixels_HWC, photometric="minisblack", planarconfig="contig", extrasamples=kinds, **layout)
    with closing(TiffSlideReader(file)) as reader:
        assert not reader.images
        assert reader.read(0, Box(0, 7, 1, 2)).tolist() == [[[255] * 3], [[90] * 3]]


@pytest.mark.parametrize(
    ("photometric", "channels"), [("palette", 1), ("miniswhite", 1), ("separated", 4), ("cielab", 3), ("ycbcr", 3)]
)
def test_colors_that_tiffslide_does_not_convert_are_refused(tmp_path: Path, photometric: str, channels: int) -> None:
    """An inverted gray slide would have no tissue, and the indices of a palette would be dark."""
    file = tmp_path / "slide.tif"
    pixels_HWC = np.full((64, 64, channels), 20, np.uint8).squeeze()
    more: dict[str, Any] = {"colormap": np.zeros((3, 256), np.uint16)} if photometric == "palette" else {}
    tifffile.imwrite(file, pixels_HWC, photometric=photometric, rowsperstrip=16, **more)
    with pytest.raises(
        SlideFormatError, match=rf"slide\.tif: .*tiffslide: its colors are stored as {photometric.upper()}"
    ):
        open_slide(file, mpp=1.0)


def test_channels_in_separate_pages_are_counted(tmp_path: Path) -> None:
    """Missing pages of an OME-TIFF are read as zeros, so a small file can claim thousands of channels."""
    file = tmp_path / "many.ome.tif"
    tifffile.imwrite(file, np.full((17, 64, 64), 200, np.uint8), tile=(64, 64), metadata={"axes": "CYX"}, ome=True)
    with tifffile.TiffFile(file) as written:
        assert written.series[0].keyframe.samplesperpixel == 1
    with pytest.raises(ValueError, match="its pixels have 17 channels; at most 16 can be read"):
        TiffSlideReader(file)
