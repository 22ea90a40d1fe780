"""Slides that lie: each is refused by name, or read as well as it can be, in little time and memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from pipeline.errors import ConfigError
from tests.full.fuzz import fuzz
from tests.full.fuzz_targets import read_slide, speckled
from tests.slides import PINK, painted, write_slide
from wsi.box import Box
from wsi.errors import ResolutionError, SlideError, SlideFormatError
from wsi.readers import LARGEST_TILE_PX, TiffSlideReader
from wsi.slide import Backend, open_slide
from wsi.tiff_tiles import jpeg_2000_size, jpeg_size

BACKENDS: list[Backend] = ["openslide", "tiffslide", "auto"]
PER_CM: dict[str, Any] = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}


def with_tags(path: Path, page: int = 0, **values: int) -> Path:
    """The file with other numbers in some tags of one of its directories."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for name, value in values.items():
            offset = tiff.pages[page].aspage().tags[name].offset
            struct.pack_into("<HII", content, offset + 2, 4, 1, value)  # LONG, one of them
    path.write_bytes(content)
    return path


def of_one_tile(path: Path, stream: bytes, compression: str | int) -> Path:
    """A slide of one tile of 128×128 pixels with this stream in it."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([stream]),
            shape=(128, 128, 3),
            dtype="uint8",
            tile=(128, 128),
            photometric="rgb",
            compression=compression,
            metadata=None,
            **PER_CM,
        )
    return path


def with_chain(path: Path, directories: int, *, loop: bool = False) -> Path:
    """A tiled TIFF with its directory many times over, or going back to itself."""
    tifffile.imwrite(path, speckled(), tile=(128, 128), photometric="rgb", metadata=None, **PER_CM)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages.first.offset
    length = 2 + 12 * struct.unpack_from("<H", content, start)[0]
    directory, base = bytes(content[start : start + length]), len(content) + len(content) % 2
    content += bytes(len(content) % 2)
    struct.pack_into("<I", content, start + length, start if loop else base)
    for number in range(0 if loop else directories):
        following = base + (number + 1) * (length + 4) if number < directories - 1 else 0
        content += directory + struct.pack("<I", following)
    path.write_bytes(content)
    return path


def refusal(path: Path, backend: Backend) -> str | None:
    """Return the error of a slide that cannot be read; None if it can be read."""
    try:
        read_slide(path, backend)
    except SlideError as error:
        return str(error)
    return None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slide_that_claims_a_billion_pixels_a_side_is_refused_before_its_memory_is_taken(
    tmp_path: Path, backend: Backend
) -> None:
    path = with_tags(write_slide(tmp_path / "huge.svs", speckled()), ImageWidth=10**9, ImageLength=10**9)
    expected = "cannot be opened as a slide" if backend == "openslide" else "1000000000×1000000000 px at 0.5 µm/px"
    with pytest.raises(SlideError, match=rf"^huge\.svs: {expected}"):
        open_slide(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("side", "compression"), [(2**20, "jpeg"), (2**20, "adobe_deflate"), (30_000, None)])
def test_a_tile_that_claims_to_be_huge_is_refused_and_does_not_end_the_process(
    tmp_path: Path, side: int, compression: str | None, backend: Backend
) -> None:
    """OpenSlide aborts the process (GLib: failed to allocate 4398046511104 bytes) when it reads one."""
    path = tmp_path / "tile.tif"
    flat_HWC = np.full((128, 128, 3), 200, np.uint8)
    tifffile.imwrite(
        path, flat_HWC, tile=(128, 128), photometric="rgb", compression=compression, metadata=None, **PER_CM
    )
    with_tags(path, ImageWidth=side, ImageLength=side, TileWidth=side, TileLength=side)
    with pytest.raises(SlideFormatError, match=rf"its tiles have {side}×{side} pixels; at most {LARGEST_TILE_PX}"):
        open_slide(path, backend=backend)


def test_a_strip_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, speckled(), photometric="rgb", metadata=None, **PER_CM)
    with_tags(path, ImageWidth=10**5, ImageLength=10**5, RowsPerStrip=10**5)
    with pytest.raises(SlideFormatError, match="its tiles have 100000×100000 pixels"):
        open_slide(path, backend="tiffslide")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("page", "size"), [(0, (0, 0)), (0, (0, 416)), (0, (640, 0)), (2, (0, 0))])
def test_a_level_without_pixels_is_refused(tmp_path: Path, page: int, size: tuple[int, int], backend: Backend) -> None:
    path = write_slide(tmp_path / "zero.svs", speckled(), mpp=1.0, levels=(1, 4))
    with_tags(path, page, ImageWidth=size[0], ImageLength=size[1])
    message = refusal(path, backend)
    if message is None:
        with open_slide(path, backend=backend) as slide:
            assert min(min(size) for size in slide.info.level_sizes) > 0
    else:
        assert message.startswith("zero.svs: ")


def test_the_sizes_of_levels_are_checked_for_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_slide(tmp_path / "zero.svs", speckled(), mpp=1.0)
    normal = TiffSlideReader.__init__

    def without_rows(self: TiffSlideReader, path: Path) -> None:
        normal(self, path)
        self.level_sizes = (*self.level_sizes, (160, 0))

    monkeypatch.setattr(TiffSlideReader, "__init__", without_rows)
    with pytest.raises(SlideFormatError, match=r"^zero\.svs: a level has no pixels \(sizes: 640×416, 160×0\)"):
        open_slide(path, backend="tiffslide")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        *((value, "does not contain micrometers per pixel; pass --mpp") for value in ("-1", "0", "nan", "inf", "abc")),
        ("1000", "1000 µm/px is not a plausible pixel size"),
        ("1e-9", "1e-09 µm/px is not a plausible pixel size"),
        ("100.1", "100.1 µm/px is not a plausible pixel size"),
    ],
)
def test_a_pixel_size_in_the_file_that_cannot_be_is_refused(
    tmp_path: Path, stated: str, reason: str, backend: Backend
) -> None:
    path = write_slide(tmp_path / "mpp.svs", speckled(), mpp=stated)  # type: ignore[arg-type] # as it stands there
    with pytest.raises(ResolutionError, match=rf"^mpp\.svs: {reason}"):
        open_slide(path, backend=backend)


@pytest.mark.parametrize("given", [-1.0, 0.0, float("nan"), float("inf"), 1000.0, 1e-9])
def test_a_pixel_size_given_by_hand_that_cannot_be_is_refused(tmp_path: Path, given: float) -> None:
    from pipeline.config import SegmentConfig

    path = write_slide(tmp_path / "mpp.svs", speckled())
    with pytest.raises(ResolutionError, match=r"^mpp\.svs: .*--mpp"):
        open_slide(path, given)
    if given not in (1000.0, 1e-9):
        with pytest.raises(ConfigError, match="--mpp is"):
            SegmentConfig(mpp=given)


@pytest.mark.parametrize(
    ("given", "good"), [("-1", False), ("0", False), ("nan", False), ("inf", False), ("1000", True)]
)
def test_a_pixel_size_in_a_manifest_that_cannot_be_is_refused(tmp_path: Path, given: str, good: bool) -> None:
    from pipeline.batch.collect import collect_jobs

    slide = write_slide(tmp_path / "mpp.svs", speckled())
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"slide,mpp\nmpp.svs,{given}\n")
    if not good:
        with pytest.raises(
            ConfigError, match=rf"manifest\.csv, line 2: mpp is '{given}'; it must be a positive number"
        ):
            collect_jobs([manifest])
        return
    (job,) = collect_jobs([manifest])  # it is a number: the slide alone fails
    with pytest.raises(ResolutionError, match="1000 µm/px is not a plausible pixel size"):
        open_slide(slide, job.mpp)


@pytest.mark.parametrize(("mpp", "reason"), [(0.5, None), (100.0, "larger than any slide")])
def test_a_slide_as_large_as_they_get_is_taken_and_a_larger_one_is_not(
    tmp_path: Path, mpp: float, reason: str | None
) -> None:
    path = write_slide(tmp_path / "a.svs", painted((2000, 1600)), mpp=mpp)
    if reason is None:
        open_slide(path).close()
    else:
        with pytest.raises(ResolutionError, match=r"2000×1600 px at 100 µm/px are 200×160 mm, larger than any slide"):
            open_slide(path)


def test_a_slide_longer_than_glass_can_be_is_refused(tmp_path: Path) -> None:
    """Found by the fuzzer: one with a row count of 2²⁴ kept tiffslide busy for minutes, chunk by chunk."""
    path = tmp_path / "long.tif"
    tifffile.imwrite(path, speckled(), photometric="rgb", rowsperstrip=32, metadata=None, **PER_CM)
    with_tags(path, ImageLength=2**24)
    with pytest.raises(ResolutionError, match=r"640×16777216 px at 1 µm/px are 1×16,777 mm, larger than any slide"):
        open_slide(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deflate_bomb_is_decoded_no_further_than_its_tile(tmp_path: Path, backend: Backend) -> None:
    packer = zlib.compressobj(1)
    stream = b"".join(packer.compress(bytes(1 << 24)) for _ in range(32)) + packer.flush()  # half a GiB in 2 MiB
    path = of_one_tile(tmp_path / "bomb.tif", stream, "adobe_deflate")
    before = peak_bytes()
    message = refusal(path, backend)
    assert message is None or message.startswith("bomb.tif: opens, but its pixels cannot be decoded")
    assert peak_bytes() - before < 128 << 20


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def jpeg_that_claims(side: int) -> bytes:
    stream = bytearray(imagecodecs.jpeg8_encode(np.full((128, 128, 3), 200, np.uint8)))
    struct.pack_into(">HH", stream, stream.find(b"\xff\xc0") + 5, side, side)
    return bytes(stream)


def jpeg_2000_that_claims(side: int) -> bytes:
    stream = bytearray(imagecodecs.jpeg2k_encode(np.full((128, 128, 3), 200, np.uint8), codecformat="j2k"))
    struct.pack_into(">II", stream, stream.find(b"\xff\x51") + 6, side, side)
    struct.pack_into(">II", stream, stream.find(b"\xff\x51") + 22, side, side)
    return bytes(stream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stream", "compression"), [(jpeg_that_claims(65_500), "jpeg"), (jpeg_2000_that_claims(10**6), 34712)]
)
def test_a_tile_whose_own_stream_claims_another_size_is_not_decoded(
    tmp_path: Path, stream: bytes, compression: str | int, backend: Backend
) -> None:
    path = of_one_tile(tmp_path / "bomb.tif", stream, compression)
    with pytest.raises(SlideError, match=r"^bomb\.tif: .*claims" if backend == "tiffslide" else r"^bomb\.tif: "):
        read_slide(path, backend)


def test_the_size_that_a_stream_states_is_that_of_its_picture() -> None:
    rgb_HWC = np.zeros((96, 160, 3), np.uint8)
    assert jpeg_size(bytes(imagecodecs.jpeg8_encode(rgb_HWC))) == (160, 96)
    assert jpeg_size(bytes(imagecodecs.jpeg8_encode(rgb_HWC))[:100]) is None
    for form in ("j2k", "jp2"):
        assert jpeg_2000_size(bytes(imagecodecs.jpeg2k_encode(rgb_HWC, codecformat=form))) == (160, 96)
    assert jpeg_size(b"") is None
    assert jpeg_2000_size(b"\xff\x4f\xff\x51") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_directories_that_go_back_to_themselves_end(tmp_path: Path, backend: Backend) -> None:
    path = with_chain(tmp_path / "loop.tif", 0, loop=True)
    if backend == "openslide":
        with pytest.raises(SlideFormatError, match=r"^loop\.tif: cannot be opened as a slide"):
            read_slide(path, backend)
    else:
        read_slide(path, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_of_thousands_of_directories_ends(tmp_path: Path, backend: Backend) -> None:
    path = with_chain(tmp_path / "chain.tif", 3000)
    if backend == "tiffslide":
        with pytest.raises(SlideFormatError, match=r"^chain\.tif: cannot be opened as a slide"):
            read_slide(path, backend)
    else:
        read_slide(path, backend)


def test_a_link_to_a_slide_is_the_slide_under_the_links_name(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write_slide(tmp_path / "store" / "1234.svs", painted((300, 250), ((20, 20, 250, 200), PINK)), mpp=1.0)
    (tmp_path / "link.svs").symlink_to(tmp_path / "store" / "1234.svs")
    with open_slide(tmp_path / "link.svs") as slide:
        assert slide.info.path.name == "link.svs"
        assert tuple(slide.read(0, Box(100, 100, 1, 1)).rgb_HWC[0, 0]) == PINK


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path), lambda path: path.symlink_to("nowhere.svs")])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "link.svs"
    make(path)
    with pytest.raises(SlideError, match=r"^link\.svs: no such file"):
        open_slide(path)


def test_spoilt_slides_end_with_a_result_or_an_error_of_ours() -> None:
    tally = fuzz("slides", seed=7, numbers=iter(range(100)))
    assert not tally.findings, tally.details()
    assert tally.tries == 100
    assert {"result", "SlideFormatError", "SlideReadError"} <= set(tally.outcomes)
