from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

import wsi.slide
from tests.slides import GLASS, PINK, PURPLE, TILE, painted, write_slide
from wsi.box import Box
from wsi.errors import ResolutionError, SlideFormatError, SlideNotFoundError, SlideReadError
from wsi.pixel_size import find_mpp
from wsi.readers import BackendName, OpenSlideReader
from wsi.slide import Backend, Slide, SlideInfo, open_slide, slide_digest, slide_stamp
from wsi.thumbnail import read_thumbnail

BACKENDS: list[BackendName] = ["openslide", "tiffslide"]


@pytest.fixture
def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 255, (300, 500, 3), dtype=np.uint8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_readers_return_the_pixels_that_were_written(
    tmp_path: Path, noise: np.ndarray, backend: BackendName
) -> None:
    path = write_slide(tmp_path / "slide.svs", noise, levels=(1, 2))
    with open_slide(path, backend=backend) as slide:
        assert slide.info.backend == backend
        assert slide.info.level_sizes == ((500, 300), (250, 150))
        assert slide.info.level_downsamples == (2.0**0, 2.0)
        rgb_HWC, unreadable = slide.read(0, Box(37, 11, 200, 150))
        np.testing.assert_array_equal(rgb_HWC, noise[11:161, 37:237])
        assert unreadable == ()
        half_HWC, _ = slide.read(1, Box(101, 53, 60, 40))
        expected = noise.reshape(150, 2, 250, 2, 3).mean(axis=(1, 3))[53:93, 101:161]
        np.testing.assert_array_equal(half_HWC, np.floor(expected + 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_the_slide_is_white(tmp_path: Path, noise: np.ndarray, backend: BackendName) -> None:
    with open_slide(write_slide(tmp_path / "slide.svs", noise), backend=backend) as slide:
        rgb_HWC, unreadable = slide.read(0, Box(-10, -20, 600, 400))
        inside = rgb_HWC[20:320, 10:510]
        np.testing.assert_array_equal(inside, noise)
        assert int(rgb_HWC.astype(int).sum()) - int(inside.astype(int).sum()) == 255 * 3 * (600 * 400 - 500 * 300)
        assert unreadable == ()
        far_HWC, _ = slide.read(0, Box(5000, 5000, 8, 8))
        assert (far_HWC == 255).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mpp_comes_from_the_argument_or_else_the_slide_or_else_the_tags_or_else_the_objective(
    tmp_path: Path, noise: np.ndarray, backend: BackendName
) -> None:
    def found(path: Path, mpp: float | None = None) -> tuple[float, str, int]:
        with open_slide(path, mpp, backend) as slide:
            return round(slide.info.mpp, 4), slide.info.mpp_source, len(slide.info.warnings)

    own = write_slide(tmp_path / "own.svs", noise, mpp=0.5, power=20, resolution_mpp=0.7)
    tags = write_slide(tmp_path / "tags.svs", noise, mpp=None, power=20, resolution_mpp=0.7)
    power = write_slide(tmp_path / "power.svs", noise, mpp=None, power=40)
    printer = write_slide(tmp_path / "printer.svs", noise, mpp=None, power=40, resolution_mpp=25400 / 300)
    nothing = write_slide(tmp_path / "nothing.svs", noise, mpp=None)
    assert found(own, 0.3) == (0.3, "argument", 1)
    assert found(own) == (0.5, "slide", 0)
    assert found(tags) == (0.7, "tiff resolution", 0)
    assert found(power) == (0.25, "objective power", 1)
    assert found(printer) == (0.25, "objective power", 1)
    with pytest.raises(ResolutionError, match=r"^nothing\.svs: does not contain micrometers per pixel; pass --mpp$"):
        found(nothing)
    with pytest.raises(ResolutionError, match=r"--mpp is -1.0; it must be a positive number"):
        found(own, -1.0)


def write_ome(path: Path, rgb_HWC: np.ndarray, metadata: dict[str, str | float], per_cm: float | None = None) -> Path:
    """Write an OME-TIFF whose OME-XML has these attributes of the image."""
    import tifffile

    more: dict[str, Any] = {} if per_cm is None else {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    more |= {"tile": (TILE, TILE), "photometric": "rgb"}
    tifffile.imwrite(path, rgb_HWC, ome=True, metadata={"axes": "YXS", **metadata}, **more)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "unit"), [(0.25, None), (0.25, "µm"), (0.25, "\u03bcm"), (250, "nm"), (0.00025, "mm"), (2500, "Å")]
)
def test_the_pixel_size_in_ome_xml_is_used_before_the_resolution_tags(
    tmp_path: Path, noise: np.ndarray, backend: BackendName, size: float, unit: str | None
) -> None:
    metadata: dict[str, str | float] = {"PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit is not None:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    for per_cm in (None, 1200 / 2.54):  # 1200 dpi is 21 µm
        path = write_ome(tmp_path / "slide.ome.tif", noise, metadata, per_cm)
        with open_slide(path, backend=backend) as slide:
            assert slide.info.mpp == pytest.approx(0.25, rel=1e-9)
            assert (slide.info.mpp_source, slide.info.warnings) == ("slide", ())
    with open_slide(path, 0.5, backend) as slide:
        assert slide.info.warnings == ("the given pixel size 0.5 µm/px is used, but the file states 0.25 µm/px",)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"PhysicalSizeX": 0.25},
        {"PhysicalSizeX": 0, "PhysicalSizeY": 0},
        {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "pixel"},
    ],
)
def test_ome_xml_without_a_length_for_both_axes_leaves_the_resolution_tags(
    tmp_path: Path, noise: np.ndarray, metadata: dict[str, str | float]
) -> None:
    with open_slide(write_ome(tmp_path / "slide.ome.tif", noise, metadata, 20_000)) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "tiff resolution")
    with pytest.raises(ResolutionError, match="does not contain micrometers per pixel; pass --mpp"):
        open_slide(write_ome(tmp_path / "slide.ome.tif", noise, metadata))


def test_the_pixel_size_in_ome_xml_is_that_of_the_image_with_the_size_of_the_slide() -> None:
    image = '<Image><Pixels SizeX="{}" SizeY="{}" PhysicalSizeX="{}" PhysicalSizeY="{}"/></Image>'
    images = image.format(30, 20, 8, 8) + image.format(500, 300, 0.3, 0.3) + image.format(500, 300, 0.4, 0.4)
    for namespace in ("", ' xmlns="http://www.openmicroscopy.org/Schemas/OME/2013-06"'):
        properties = {"tiff.ImageDescription": f"<OME{namespace}>{images}</OME>"}
        mpp, source, warnings = find_mpp(Path("a.tif"), properties, (500, 300), None)
        assert (round(mpp, 9), source, warnings) == (0.3, "slide", ())
        with pytest.raises(ResolutionError):
            find_mpp(Path("a.tif"), properties, (500, 301), None)
    for text in ("", "<OME>", "no XML", "<OME/>", "<OME><Image/></OME>", "\0", "\udcff"):
        with pytest.raises(ResolutionError):
            find_mpp(Path("a.tif"), {"tiff.ImageDescription": text}, (500, 300), None)


def test_a_missing_file_a_broken_file_and_a_folder_have_their_own_errors(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(SlideNotFoundError, match=r"^none\.svs: no such file"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(SlideNotFoundError):
        open_slide(tmp_path)
    with pytest.raises(SlideFormatError, match=r"^text\.svs: cannot be opened as a slide"):
        open_slide(tmp_path / "text.svs")


@pytest.mark.parametrize("read", [open_slide, slide_digest, slide_stamp])
def test_a_path_that_cannot_be_examined_is_an_error_with_the_reason(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / ("n" * 300 + ".svs")
    with pytest.raises(SlideReadError, match=r"^n+\.svs: cannot be read: File name too long; check its permissions"):
        read(path)


@pytest.mark.parametrize("read", [open_slide, slide_digest, slide_stamp])
def test_an_error_of_the_file_system_stays_the_cause(
    tmp_path: Path, unexaminable: Callable[[Path, int], None], read: Callable[[Path], object]
) -> None:
    path = tmp_path / "a.svs"
    path.touch()
    unexaminable(tmp_path, errno.ESTALE)
    with pytest.raises(SlideReadError, match=r"^a\.svs: cannot be read: Stale file handle") as caught:
        read(path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ESTALE


def test_a_file_that_vanishes_while_it_is_opened_is_an_error_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, painted((256, 256)), photometric="rgb", tile=(256, 256))
    open_reader = wsi.slide._open_reader

    def open_and_delete(path: Path, backend: Backend) -> object:
        opened = open_reader(path, backend)
        path.unlink()
        return opened

    monkeypatch.setattr(wsi.slide, "_open_reader", open_and_delete)
    with pytest.raises(SlideReadError, match=r"^slide\.tif: cannot be read: No such file or directory"):
        open_slide(path, 0.5)


def test_errors_of_known_bad_files_contain_the_name_and_the_reason(shared_slides: Path) -> None:
    for name, error, words in (
        ("broken.svs", SlideFormatError, "cannot be opened as a slide"),
        ("unreadable.svs", SlideReadError, "Bogus marker length"),
        ("unopenable.tiff", SlideReadError, "52479"),
        ("TCGA-CR-7395-01A-01-TS1.svs", ResolutionError, "pass --mpp"),
    ):
        with pytest.raises(error, match=f"^{name}: .*{words}"):
            open_slide(shared_slides / name)


def test_an_error_about_pixels_states_what_can_help(tmp_path: Path, noise: np.ndarray) -> None:
    import tifffile

    layout: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "padded.tif", noise, tile=(240, 240), **layout)  # libtiff refuses padded tiles
    tifffile.imwrite(tmp_path / "float.tif", noise.astype(np.float32), tile=(256, 256), **layout)
    tifffile.imwrite(tmp_path / "deep.tif", noise.astype(np.uint16), tile=(256, 256), **layout)
    open_slide(tmp_path / "padded.tif", 1.0, "tiffslide").close()
    open_slide(tmp_path / "deep.tif", 1.0).close()
    convert = "if other programs can show the slide, convert it to 8-bit RGB; otherwise copy or scan it again"
    for name, backend, help_ in (
        ("padded", "auto", "pass --backend tiffslide, which can decode them"),
        ("padded", "openslide", f"pass --backend auto, or, {convert}"),
        ("deep", "tiffslide", f"pass --backend auto, or, {convert}"),
        ("float", "auto", convert),
    ):
        with pytest.raises(
            SlideReadError, match=rf"^{name}\.tif: opens, but its pixels cannot be decoded \(.*\); {help_}$"
        ):
            open_slide(tmp_path / f"{name}.tif", 1.0, backend)


def test_a_dicom_slide_opens(shared_slides: Path) -> None:
    with open_slide(shared_slides / "camelyon-multiframe.dcm") as slide:
        assert slide.info.size_l0 == (1152, 700)
        assert slide.info.mpp == pytest.approx(28.97, abs=0.01)
        assert slide.info.vendor == "dicom"


def test_unreadable_tiles_are_white_and_listed_and_the_others_are_read(tmp_path: Path) -> None:
    """The deflate stream of one tile is overwritten in the file; its neighbors must still be right."""
    pink = painted((1024, 768), ((0, 0, 1024, 768), PINK))
    path = write_slide(tmp_path / "slide.svs", pink)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        columns = 1024 // TILE
        tile = 3 * columns + 4
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    for backend in BACKENDS:
        with open_slide(path, backend=backend) as slide:
            for _ in range(2):  # the second time through the reopened handle
                rgb_HWC, unreadable = slide.read(0, Box(0, 0, 1024, 768))
                white_HW = (rgb_HWC == 255).all(axis=2)
                bad = np.zeros_like(white_HW)
                for box in unreadable:
                    bad[box.y : box.bottom, box.x : box.right] = True
                np.testing.assert_array_equal(white_HW, bad)
                assert bad[3 * TILE : 4 * TILE, 4 * TILE : 5 * TILE].all()
                assert bad.sum() <= 256 * 256
                assert (rgb_HWC[~bad] == PINK).all()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "no"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_reader_that_lacks_memory_or_threads_raises_its_error_and_no_tile_is_lost(
    tmp_path: Path, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def short(*_: object) -> np.ndarray:
        raise error

    path = write_slide(tmp_path / "slide.svs", noise)
    with open_slide(path, backend="openslide") as slide:
        monkeypatch.setattr(OpenSlideReader, "read", short)
        with pytest.raises(type(error)) as raised:
            slide.read(0, Box(0, 0, 8, 8))
        assert raised.value is error
    with pytest.raises(type(error)) as raised:
        open_slide(path, backend="openslide")
    assert raised.value is error


def test_a_decoder_that_lacks_memory_for_what_a_damaged_tile_claims_makes_the_tile_unreadable(
    tmp_path: Path, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> np.ndarray:
        raise RuntimeError("Insufficient memory (case 4)")

    with open_slide(write_slide(tmp_path / "slide.svs", noise), backend="openslide") as slide:
        monkeypatch.setattr(OpenSlideReader, "read", damaged)
        assert slide.read(0, Box(0, 0, 8, 8)).unreadable_lv == (Box(0, 0, 8, 8),)


class _BoundedReader(OpenSlideReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        bounds = {"x": "100", "y": "50", "width": "300", "height": "200"}
        self.properties = {**self.properties, **{f"openslide.bounds-{k}": v for k, v in bounds.items()}}


def test_bounds_are_used_only_if_all_four_are_present(
    tmp_path: Path, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "slide.svs", noise)
    with open_slide(path) as slide:
        assert slide.info.bounds_l0 == Box(0, 0, 500, 300)
    monkeypatch.setitem(__import__("wsi.readers").readers.READERS, "openslide", _BoundedReader)
    with open_slide(path) as slide:
        assert slide.info.bounds_l0 == Box(100, 50, 300, 200)


def test_names_with_spaces_and_unicode_open(tmp_path: Path) -> None:
    folder = tmp_path / "föld er"
    folder.mkdir()
    path = write_slide(folder / "größe 組織 😀.svs", painted((200, 200), ((20, 20, 99, 99), PURPLE)))
    for backend in BACKENDS:
        with open_slide(path, backend=backend) as slide:
            assert tuple(slide.read(0, Box(30, 30, 1, 1)).rgb_HWC[0, 0]) == PURPLE
            assert tuple(slide.read(0, Box(0, 0, 1, 1)).rgb_HWC[0, 0]) == GLASS


def test_the_digest_depends_on_the_bytes_and_for_mirax_on_the_folder(tmp_path: Path) -> None:
    a, b = tmp_path / "a.svs", tmp_path / "b.svs"
    a.write_bytes(b"pixels")
    shutil.copy(a, b)
    assert slide_digest(a) == slide_digest(b) == hashlib.sha256(b"pixels").hexdigest()
    b.write_bytes(b"Pixels")
    assert slide_digest(a) != slide_digest(b)
    mirax = tmp_path / "m.mrxs"
    mirax.write_bytes(b"")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Data0001.dat").write_bytes(b"1")
    before = slide_digest(mirax)
    (tmp_path / "m" / "Data0001.dat").write_bytes(b"2")
    assert slide_digest(mirax) != before


def test_the_stamp_changes_with_every_write_to_the_files_of_a_slide_and_with_nothing_else(tmp_path: Path) -> None:
    mirax, part = tmp_path / "m.mrxs", tmp_path / "m" / "Data0001.dat"
    part.parent.mkdir()
    mirax.write_bytes(b"")
    part.write_bytes(b"1")
    os.utime(part, ns=(1, 10**18))
    before = slide_stamp(mirax)
    (tmp_path / "other.svs").write_bytes(b"1")
    part.read_bytes()
    assert slide_stamp(mirax) == before
    os.utime(part, ns=(1, 10**18 + 1))
    assert slide_stamp(mirax) != before
    part.write_bytes(b"12")
    os.utime(part, ns=(1, 10**18))
    assert slide_stamp(mirax) != before
    with pytest.raises(SlideNotFoundError, match=r"gone\.svs: no such file"):
        slide_stamp(tmp_path / "gone.svs")


def test_threads_share_a_slide(tmp_path: Path, noise: np.ndarray) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = write_slide(tmp_path / "slide.svs", noise)

    def check(slide: Slide, x: int) -> bool:
        return bool((slide.read(0, Box(x, 0, 50, 300)).rgb_HWC == noise[:, x : x + 50]).all())

    with open_slide(path) as slide, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda x: check(slide, x % 450), range(200)))


@given(st.tuples(st.integers(1, 200_000), st.integers(1, 200_000)), st.sampled_from([2, 4, 16, 32]), st.booleans())
def test_both_ends_of_a_level_lie_within_one_pixel_of_the_slides(
    size_l0: tuple[int, int], factor: int, up: bool
) -> None:
    width, height = (max(1, (side + up * (factor - 1)) // factor) for side in size_l0)
    info = SlideInfo(
        Path("s.svs"), "openslide", "aperio", (size_l0, (width, height)), 0.25, "slide", Box(0, 0, *size_l0)
    )
    downsample = info.level_downsamples[1]
    assert abs(size_l0[0] - width * downsample) <= max(downsample, factor)
    assert abs(size_l0[1] - height * downsample) <= max(downsample, factor)


def test_a_picture_of_another_shape_is_not_a_level(tmp_path: Path) -> None:
    """OpenSlide counts every tiled image that is marked as reduced as a level, such as a picture of the glass."""
    rgb_HWC = painted((2048, 1024), ((512, 256, 1024, 512), PINK))
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, image_HWC in enumerate((rgb_HWC, rgb_HWC[::4, ::4], painted((256, 256)))):
            tiff.write(image_HWC, tile=(128, 128), photometric="rgb", subfiletype=int(number > 0), metadata=None)
    with open_slide(path, 0.5, "openslide") as slide:
        assert slide.info.level_sizes == ((2048, 1024), (512, 256))
        assert slide.info.warnings == (
            "level 2 (256×256 px) differs in shape from the slide (2048×1024 px); levels from 2 on are not used",
        )
        thumbnail_HWC = read_thumbnail(slide, 8.0).rgb_HWC
    expected_HWC = painted((128, 64), ((32, 16, 64, 32), PINK))
    np.testing.assert_array_equal(thumbnail_HWC, expected_HWC)
    with open_slide(path, 0.5) as slide:
        assert slide.info.level_sizes == ((2048, 1024), (512, 256))
