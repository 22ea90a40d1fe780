"""Data sets of every form, and the errors for broken ones."""

from __future__ import annotations

import logging
import re
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from models.tissue_class import TissueClass
from pipeline.errors import (
    DatasetError,
    DatasetFileError,
    LabelError,
    MaskError,
    MissingImagesError,
    UnreadableImageError,
)
from pipeline.training.dataset import (
    IGNORED,
    Dataset,
    Sample,
    background_HW,
    check_images,
    labeled_boxes,
    load_dataset,
    read_mask,
    read_rgb,
    samples,
)
from pipeline.training.dataset_sections import BackgroundRule
from tests.pipeline.training.tiny_datasets import (
    CROP_LABELS,
    FILE_NAME_LABELS,
    HEAD,
    image,
    mask,
    names,
    plain,
    put,
)


def test_the_published_layout_has_labels_in_training_names_and_masks_elsewhere(tmp_path: Path) -> None:
    image(tmp_path / "training" / "9-[0 1].png")
    image(tmp_path / "training" / "10[10].png")
    image(tmp_path / "val" / "img" / "v.png")
    values_HW = plain()
    values_HW[0, 0] = 2
    mask(tmp_path / "val" / "mask" / "v.png", values_HW)
    dataset = load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS))

    train, val = samples(dataset, "train"), samples(dataset, "val")

    assert dataset.classes == (TissueClass("red", (200, 0, 0)), TissueClass("blue", (0, 0, 200)))
    assert (dataset.class_names, dataset.mpp) == (("red", "blue"), 0.5)
    assert names(train) == ["10[10]", "9-[0 1]"]
    assert [sample.labels_K for sample in train] == [(True, False), (False, True)]
    assert [(sample.mask, sample.group) for sample in train] == [(None, ""), (None, "")]
    assert val == (Sample("v", tmp_path / "val" / "img" / "v.png", tmp_path / "val" / "mask" / "v.png", "", None),)
    whole = labeled_boxes(dataset, train[1])
    assert (whole.boxes_B4.tolist(), whole.present_BK.tolist()) == ([[0, 0, 12, 10]], [[False, True]])
    # A single blue pixel of the validation image counts, because presence has no minimum here.
    counted = labeled_boxes(dataset, val[0])
    assert (counted.boxes_B4.tolist(), counted.present_BK.tolist()) == ([[0, 0, 12, 10]], [[True, True]])


def test_the_minimum_share_of_whole_masks_is_a_setting(tmp_path: Path) -> None:
    image(tmp_path / "val" / "img" / "v.png")
    values_HW = plain()
    values_HW[0, :12] = 1
    mask(tmp_path / "val" / "mask" / "v.png", values_HW)
    dataset = load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS + "mask_minimum = 0.1"))

    assert labeled_boxes(dataset, samples(dataset, "val")[0]).present_BK.tolist() == [[True, False]]


def test_crops_of_a_mask_are_labeled_by_presence(tmp_path: Path) -> None:
    image(tmp_path / "img" / "a.png")
    values_HW = plain()
    values_HW[:, 9:] = 1
    mask(tmp_path / "mask" / "a.png", values_HW)
    dataset = load_dataset(put(tmp_path, HEAD + CROP_LABELS))

    (sample,) = samples(dataset, "train")
    labeled = labeled_boxes(dataset, sample)

    assert sample.labels_K is None
    assert labeled.boxes_B4.tolist() == [[0, 0, 8, 8], [4, 0, 8, 8], [0, 2, 8, 8], [4, 2, 8, 8]]
    assert labeled.present_BK.tolist() == [[True, False], [True, True], [True, False], [True, True]]


def test_the_first_matching_pattern_is_used_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    image(tmp_path / "train" / "a[10].png")
    image(tmp_path / "training" / "b[10].png")
    image(tmp_path / "train" / "c[10].png").rename(tmp_path / "train" / "._c[10].png")
    dataset = load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS))

    assert names(samples(dataset, "train")) == ["a[10]"]


def test_the_root_is_the_argument_the_key_or_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    named = put(tmp_path, 'root = "data"\n' + HEAD + CROP_LABELS)

    assert load_dataset(named).root == tmp_path / "data"
    assert load_dataset(str(named), tmp_path / "other").root == tmp_path / "other"
    assert load_dataset(put(tmp_path, HEAD + CROP_LABELS)).root == tmp_path
    outside = put(tmp_path / "data", 'root = "../other"\n' + HEAD + CROP_LABELS)
    assert load_dataset(outside).root.resolve() == tmp_path / "other"


@pytest.fixture
def masked(tmp_path: Path) -> tuple[Dataset, Sample]:
    """Return one image with a mask that contains every value of the card."""
    image(tmp_path / "img" / "a.png")
    values_HW = plain()
    values_HW[0, :5] = [0, 1, 2, 4, 0]
    mask(tmp_path / "mask" / "a.png", values_HW)
    dataset = load_dataset(put(tmp_path, HEAD + CROP_LABELS))
    return dataset, samples(dataset, "train")[0]


def test_a_mask_is_read_by_palette_index(masked: tuple[Dataset, Sample]) -> None:
    labels_HW = read_mask(*masked)

    assert labels_HW[0, :5].tolist() == [0, 1, 1, IGNORED, 0]
    assert labels_HW.shape == (10, 12)
    assert labels_HW.dtype == np.uint8
    assert not labels_HW[1:].any()


@pytest.mark.parametrize("mode", ["L", "1"])
def test_gray_and_binary_masks_contain_class_values_too(masked: tuple[Dataset, Sample], mode: str) -> None:
    dataset, sample = masked
    assert sample.mask is not None
    values_HW = plain()
    values_HW[3] = 1
    Image.fromarray(values_HW * 255).convert(mode).save(sample.mask) if mode == "1" else mask(
        sample.mask, values_HW, "L"
    )

    assert read_mask(dataset, sample)[:, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_an_image_of_any_mode_is_read_as_rgb(masked: tuple[Dataset, Sample]) -> None:
    _, sample = masked
    rgb_HWC = read_rgb(sample)
    assert rgb_HWC.shape == (10, 12, 3)
    assert rgb_HWC.dtype == np.uint8
    assert rgb_HWC[4, 7].tolist() == [90, 20, 30]

    Image.new("RGBA", (12, 10), (1, 2, 3, 1)).save(sample.image)
    assert read_rgb(sample)[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_of_an_image_are_white(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.tif" if mode == "PA" else "a.png")  # PNG has no palette with alpha
    if mode == "P":
        made = Image.new("P", (4, 1), 0)
        made.putpalette([7, 7, 7, 9, 9, 9])
        made.putpixel((3, 0), 1)
        made.save(file, transparency=1)
    else:
        made = Image.new("RGBA", (4, 1), (7, 7, 7, 255))
        made.putpixel((3, 0), (9, 9, 9, 0))
        made.convert(mode).save(file)
    assert read_rgb(Sample("a", file, None, "", None)).tolist() == [[[7] * 3] * 3 + [[255] * 3]]


def test_the_error_names_both_files_if_mask_and_image_sizes_differ(masked: tuple[Dataset, Sample]) -> None:
    dataset, sample = masked
    assert sample.mask is not None
    mask(sample.mask, plain(width=11))

    with pytest.raises(MaskError) as raised:
        labeled_boxes(dataset, sample)
    assert str(raised.value) == f"{sample.mask}: is 11x10 px, but its image {sample.image} is 12x10 px"


def test_the_error_names_an_unknown_mask_value_and_the_known_values(masked: tuple[Dataset, Sample]) -> None:
    dataset, sample = masked
    assert sample.mask is not None
    values_HW = plain()
    values_HW[5, 5:7] = [3, 254]
    mask(sample.mask, values_HW)

    with pytest.raises(MaskError) as raised:
        read_mask(dataset, sample)
    assert str(raised.value).startswith(f"{sample.mask}: contains the value(s) 3, 254, which no class has")
    assert "red [0], blue [1, 2]; mask_excluded [4]" in str(raised.value)


def test_an_rgb_mask_is_refused(masked: tuple[Dataset, Sample]) -> None:
    dataset, sample = masked
    assert sample.mask is not None
    image(sample.mask)

    with pytest.raises(MaskError, match=r"a.png: has mode RGB; a mask must be a palette or 8-bit gray image"):
        read_mask(dataset, sample)


def test_the_error_names_a_missing_or_unreadable_mask(masked: tuple[Dataset, Sample]) -> None:
    dataset, sample = masked
    assert sample.mask is not None
    sample.mask.write_bytes(b"no image")
    with pytest.raises(MaskError, match=r"mask.a\.png: cannot be read"):
        read_mask(dataset, sample)

    sample.mask.unlink()
    with pytest.raises(MaskError, match=r"mask.a\.png: the mask of a is missing"):
        samples(dataset, "train")
    with pytest.raises(MaskError, match=r"img.a\.png: has no mask"):
        read_mask(dataset, Sample("a", sample.image, None, "", None))


def test_a_16_bit_image_is_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)).save(tmp_path / "deep.png")

    with pytest.raises(UnreadableImageError, match=r"deep\.png: has mode I;16; an image must have 8"):
        read_rgb(Sample("deep", tmp_path / "deep.png", None, "", None))


def write_deep_png(file: Path, rgb_HWC: NDArray[np.uint16]) -> None:
    """Write an RGB image with 16 bits per channel, as cameras do, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = rgb_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_a_color_image_with_16_bits_per_channel_is_refused(tmp_path: Path) -> None:
    rgb_HWC = np.full((4, 6, 3), 4000, dtype=np.uint16)  # nearly white for a camera with 12 bits
    write_deep_png(tmp_path / "deep.png", rgb_HWC)
    tifffile.imwrite(tmp_path / "deep.tif", rgb_HWC, photometric="rgb")
    planes_CHW = rgb_HWC.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "planes.tif", planes_CHW, photometric="rgb", planarconfig="separate")
    for name in ("deep.png", "deep.tif", "planes.tif"):
        with Image.open(tmp_path / name) as opened:
            assert (opened.mode, opened.size) == ("RGB", (6, 4))
        with pytest.raises(UnreadableImageError, match=rf"{name}: has more than 8 bits per channel; convert the file"):
            read_rgb(Sample("deep", tmp_path / name, None, "", None))
    tifffile.imwrite(tmp_path / "plain.tif", rgb_HWC.astype(np.uint8), photometric="rgb")
    assert (read_rgb(Sample("plain", tmp_path / "plain.tif", None, "", None)) == 4000 % 256).all()


def test_jpeg_2000_and_portable_pixmaps_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    rgb_HWC = np.full((16, 16, 3), 3000, dtype=np.uint16)
    (tmp_path / "deep.jp2").write_bytes(
        imagecodecs.jpeg2k_encode(rgb_HWC, level=0, bitspersample=12, codecformat="jp2")
    )
    (tmp_path / "deep.ppm").write_bytes(b"P6 16 16 4095\n" + rgb_HWC.astype(">u2").tobytes())
    for name in ("deep.jp2", "deep.ppm"):
        with pytest.raises(UnreadableImageError, match=rf"{name}: has more than 8 bits per channel; convert the file"):
            read_rgb(Sample("deep", tmp_path / name, None, "", None))
    plain_HWC = np.full((16, 16, 3), 77, dtype=np.uint8)
    (tmp_path / "plain.jp2").write_bytes(imagecodecs.jpeg2k_encode(plain_HWC, level=0, codecformat="jp2"))
    (tmp_path / "plain.ppm").write_bytes(b"P6 16 16 255\n" + plain_HWC.tobytes())
    # Five or six bits per channel, in pixels of 16 bits.
    header = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 66 + 512, 0, 66, 40, 16, 16, 1, 16, 3, 512, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "plain.bmp").write_bytes(header + masks + np.full(256, 0b01001_010011_01001, "<u2").tobytes())
    for name in ("plain.jp2", "plain.ppm", "plain.bmp"):
        read = read_rgb(Sample("plain", tmp_path / name, None, "", None))
        assert np.abs(read.astype(int) - 77).max() <= 4, name


def test_background_is_bright_pieces_of_at_least_the_smallest_size() -> None:
    rgb_HWC = np.full((30, 30, 3), 120, dtype=np.uint8)
    rgb_HWC[0:5, 0:10] = 201  # 50 pixels
    rgb_HWC[10:17, 0:7] = 255  # 49 pixels
    rgb_HWC[20:30, 20:30] = 200  # not brighter than 200
    rgb_HWC[17:24, 7:14] = 255  # 49 more, touching the former by a corner only
    rgb_HWC[0:10, 20:30] = (255, 215, 0)  # luma 202

    expected_HW = np.zeros((30, 30), dtype=bool)
    expected_HW[0:5, 0:10] = True
    expected_HW[0:10, 20:30] = True
    assert np.array_equal(background_HW(rgb_HWC, BackgroundRule()), expected_HW)
    everything = background_HW(rgb_HWC, BackgroundRule(gray_above=100, smallest_px=0))
    assert everything.all()
    assert not background_HW(rgb_HWC, BackgroundRule(gray_above=255)).any()


@pytest.fixture
def ten(tmp_path: Path) -> tuple[Sample, ...]:
    """Return ten images of which two cannot be opened: one is empty, one is truncated."""
    for n in range(10):
        file = image(tmp_path / "train" / f"{n}[10].png", width=64, height=64)
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    (tmp_path / "train" / "3[10].png").write_bytes(b"")
    whole = (tmp_path / "train" / "7[10].png").read_bytes()
    (tmp_path / "train" / "7[10].png").write_bytes(whole[: len(whole) // 2])
    return samples(load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS)), "train")


def test_unreadable_images_are_logged_counted_and_skipped(
    ten: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        readable = check_images(ten, limit=0.2)

    assert names(readable) == [f"{n}[10]" for n in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert "3[10].png: cannot be read" in caplog.text
    assert "7[10].png: cannot be read" in caplog.text
    assert "2 of 10 images cannot be read and are skipped" in caplog.text


def test_more_unreadable_images_than_the_limit_are_an_error(ten: tuple[Sample, ...]) -> None:
    with pytest.raises(
        UnreadableImageError, match=r"2 of 10 images cannot be read, at most 19\.0% may fail; .*3\[10\]\.png.*7\[10\]"
    ):
        check_images(ten, limit=0.19)


def test_the_error_names_an_unreadable_image(ten: tuple[Sample, ...]) -> None:
    for index in (3, 7):
        with pytest.raises(UnreadableImageError, match=rf"{index}\[10\]\.png: cannot be read"):
            read_rgb(ten[index])


def test_good_images_are_returned_without_a_warning(ten: tuple[Sample, ...], caplog: pytest.LogCaptureFixture) -> None:
    assert check_images(ten[:3], limit=0) == ten[:3]
    assert caplog.text == ""


def test_the_error_names_the_file_of_an_invalid_label(tmp_path: Path) -> None:
    image(tmp_path / "train" / "good[10].png")
    bad = image(tmp_path / "train" / "bad[1x].png")
    dataset = load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS))

    with pytest.raises(LabelError, match="the file name has no label") as raised:
        samples(dataset, "train")
    assert str(bad) in str(raised.value)


def test_the_error_for_missing_images_names_the_folder_and_the_patterns(tmp_path: Path) -> None:
    dataset = load_dataset(put(tmp_path, HEAD + FILE_NAME_LABELS))

    with pytest.raises(MissingImagesError) as raised:
        samples(dataset, "train")
    assert f"no images for split train in {tmp_path}; tried train/*.png, training/*.png;" in str(raised.value)
    with pytest.raises(MissingImagesError, match="does not describe split test, only train, val"):
        samples(dataset, "test")


def test_a_pattern_that_is_too_long_for_a_file_name_is_an_error(tmp_path: Path) -> None:
    dataset = load_dataset(put(tmp_path, (HEAD + FILE_NAME_LABELS).replace("train/*.png", "9" * 300)))
    # From Python 3.13 on, nothing matches such a pattern.
    message = r"is not a valid pattern for images: .*too long|no images for split train in .*; tried 9{300},"
    with pytest.raises(DatasetError, match=message):
        samples(dataset, "train")


def test_two_images_of_the_same_name_are_an_error(tmp_path: Path) -> None:
    first, second = image(tmp_path / "red" / "a.png"), image(tmp_path / "blue" / "a.png")
    rest = '[images]\ntrain = [{ image = "*/*.png" }]\n[labels]\nsource = "folders"\n'
    dataset = load_dataset(put(tmp_path, HEAD + rest))

    with pytest.raises(DatasetFileError, match="two images have the name a: ") as raised:
        samples(dataset, "train")
    assert str(first) in str(raised.value)
    assert str(second) in str(raised.value)


def test_the_error_names_an_unknown_data_set_or_missing_folder(tmp_path: Path) -> None:
    names = "bcss-wsss, colon-gland, colorectal, ebhi-seg, glas, kather-2016, luad-histoseg"
    with pytest.raises(DatasetFileError, match=f"nowhere: there is no .* {names}"):
        load_dataset("nowhere")
    with pytest.raises(DatasetFileError, match="glas: pass the folder of this data set"):
        load_dataset("glas")
    with pytest.raises(DatasetFileError, match=f"glas: the folder {re.escape(str(tmp_path / 'gone'))} does not exist"):
        load_dataset("glas", tmp_path / "gone")
    assert issubclass(DatasetFileError, DatasetError)


def test_a_folder_stands_for_the_description_in_it(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "dataset.toml").write_text(HEAD + CROP_LABELS, encoding="utf-8")
    assert load_dataset(tmp_path) == load_dataset(tmp_path / "dataset.toml")
