"""Composed images: tiles of one color per tissue, so that every pixel shows which tissue it came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DatasetFileError, OutputError, UnreadableImageError
from pipeline.training.compose import (
    blank_image,
    compose_image,
    composed,
    cover,
    draw_cells,
    without_whole,
)
from pipeline.training.dataset import IGNORED, Dataset, labeled_boxes, load_dataset, read_mask, read_rgb, samples
from pipeline.training.dataset_sections import Split
from pipeline.training.pieces import kinds_of, pieces_of
from pipeline.training.resample import resampled
from tests.pipeline.training.single_tissue import TOML, with_whole_images, write_tiles

WHOLE = """
[[compose.whole]]
dataset = "ebhi-seg"
folder = "other"
"""

CUT_OF_ANOTHER_CLASS = """minimum = 0.05

[[compose.cut]]
dataset = "ebhi-seg"
folder = "other"
column = "gland_class"
tissues = [{ classes = ["a", "c"], mask = "gland", share = [0.9, 1.0], sides = [64] }]
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiles(tmp_path_factory.mktemp("tiles"))


@given(st.integers(0, 2**32 - 1))
def test_weights_of_a_layout_sum_to_one_and_every_pixel_belongs_to_an_area(seed: int) -> None:
    cells = draw_cells(32, np.random.default_rng(seed))
    assert cells.weights_SHW.shape == (len(cells.areas_S), 32, 32)
    assert (cells.weights_SHW >= 0).all()
    np.testing.assert_allclose(cells.weights_SHW.sum(axis=0), 1, atol=1e-5)
    assert cells.areas_S.min() >= 0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_cover_contains_only_neighbors_of_its_image(height: int, width: int, seed: int) -> None:
    # Values grow by 1 along x and by 10 along y, so a step between neighbors is 0 (a reflection), 1 or 10.
    image_HWC = np.broadcast_to(10 * np.arange(7)[:, None, None] + np.arange(9)[:, None], (7, 9, 3)).astype(np.uint8)
    covered_HW = cover(image_HWC, height, width, np.random.default_rng(seed))[:, :, 0].astype(int)
    assert covered_HW.shape == (height, width)
    for axis in (0, 1):
        assert set(np.abs(np.diff(covered_HW, axis=axis)).ravel().tolist()) <= {0, 1, 10}


def test_an_image_shows_each_tissue_where_its_map_says(tiles: Dataset) -> None:
    kinds, pieces = kinds_of(tiles), pieces_of(tiles, "train")
    rule = tiles.card.compose
    assert rule is not None
    seen: set[int] = set()
    for seed in range(12):
        rgb_HWC, values_HW = compose_image(pieces, kinds, rule, np.random.default_rng(seed))
        assert rgb_HWC.shape == (64, 64, 3)
        seen |= set(np.unique(values_HW).tolist())
        strongest_HW = rgb_HWC.argmax(axis=2)
        for value, channel in ((0, 0), (1, 1), (3, 2)):
            # Near a blended border, a pixel may have more of the neighbor's color.
            inside_HW = scipy.ndimage.binary_erosion(values_HW == value, iterations=8)
            assert (strongest_HW[inside_HW] == channel).all()
        if (values_HW == 2).sum() > 300:
            assert np.median(rgb_HWC[values_HW == 2]) > 200
    assert seen == {0, 1, 2, 3}


def test_blank_glass_is_bright_and_nearly_gray() -> None:
    for seed in range(20):
        rgb_HWC = blank_image(20, 30, np.random.default_rng(seed)).astype(int)
        assert rgb_HWC.shape == (20, 30, 3)
        assert rgb_HWC.mean() > 210
        assert np.ptp(rgb_HWC.mean(axis=(0, 1))) <= 12.5


def test_blank_glass_has_up_to_25_specks_of_dust() -> None:
    specks = []
    for seed in range(20):
        rgb_HWC = blank_image(100, 100, np.random.default_rng(seed)).astype(int)
        # Noise and gradient stay within 15 of the median.
        dark_HW = (np.median(rgb_HWC, axis=(0, 1)) - rgb_HWC).min(axis=2) > 15
        assert dark_HW.mean() < 0.1
        specks.append(scipy.ndimage.label(dark_HW)[1])
    assert min(specks) <= 3
    assert 8 <= max(specks) <= 35  # a Poisson number with a mean of at most 25; weak specks do not show


def test_composed_images_are_a_data_set_of_labeled_windows(tiles: Dataset, tmp_path: Path) -> None:
    made = composed(tiles, tmp_path)
    assert made.class_names == tiles.class_names
    assert (made.mpp, made.card.splits, made.classes[2].role) == (0.5, ("train", "val"), "background")
    assert [len(samples(made, split)) for split in ("train", "val")] == [3, 2]
    for sample in samples(made, "train"):
        labels_HW = read_mask(made, sample)
        assert set(np.unique(labels_HW).tolist()) <= {0, 1, 2, IGNORED}
        labeled = labeled_boxes(made, sample)
        assert labeled.present_BK.any(axis=1).all()
        for (x, y, w, h), present_K in zip(labeled.boxes_B4.tolist(), labeled.present_BK, strict=True):
            box_HW = labels_HW[y : y + h, x : x + w]
            for k in range(3):
                assert present_K[k] or (box_HW == k).mean() <= 0.05
            if not (box_HW == IGNORED).any():
                assert present_K.tolist() == [(box_HW == k).mean() > 0.05 for k in range(3)]


def test_composing_again_gives_the_same_images_and_keeps_existing_ones(tiles: Dataset, tmp_path: Path) -> None:
    first, second = (composed(tiles, tmp_path / name, ("val",)) for name in ("first", "second"))
    for a, b in zip(samples(first, "val"), samples(second, "val"), strict=True):
        np.testing.assert_array_equal(read_rgb(a), read_rgb(b))
        np.testing.assert_array_equal(read_mask(first, a), read_mask(second, b))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")}
    composed(tiles, tmp_path / "first", ("val",))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")} == before


def repaint(file: Path) -> None:
    with Image.open(file) as image:
        size, mode = image.size, image.mode
    Image.new(mode, size, 1 if mode == "L" else (9, 9, 9)).save(file)


@pytest.mark.parametrize("changed", ["tiles/A/A-3-0.png", "other/img/case-{n}.png", "other/mask/case-{n}.png"])
def test_images_are_composed_again_if_a_file_they_are_made_of_has_changed(tmp_path: Path, changed: str) -> None:
    dataset, made = with_whole_images(tmp_path), tmp_path / "made"
    before = composed(dataset, made, ("val",))
    case = samples(load_dataset("ebhi-seg", tmp_path / "other"), "val")[0].name
    repaint(tmp_path / changed.format(n=case.removeprefix("case-")))
    after = composed(dataset, made, ("val",))
    assert after.root != before.root
    assert composed(dataset, tmp_path / "new", ("val",)).root.name == after.root.name


def test_images_are_composed_again_if_labels_groups_or_positions_have_changed(tmp_path: Path) -> None:
    dataset, made = write_tiles(tmp_path / "tiles"), tmp_path / "made"
    roots = [composed(dataset, made, ("val",)).root]
    table = dataset.root / "meta.csv"
    for old, new in (("A/A-3-5.png,3,s3", "A/A-3-5.png,3,s4"), ("A/A-3-4.png,3,s3,17", "A/A-3-4.png,3,s3,99")):
        assert old in table.read_text()
        table.write_text(table.read_text().replace(old, new))
        roots.append(composed(dataset, made, ("val",)).root)
    (dataset.root / "A/A-3-3.png").rename(dataset.root / "B/A-3-3.png")
    table.write_text(table.read_text().replace("A/A-3-3.png", "B/A-3-3.png"))
    roots.append(composed(dataset, made, ("val",)).root)
    assert len(set(roots)) == 4


def test_the_same_data_in_another_folder_are_not_composed_again(tmp_path: Path) -> None:
    made = tmp_path / "made"
    first, second = (composed(write_tiles(tmp_path / name), made, ("val",)) for name in ("first", "second"))
    assert first.root == second.root


def test_the_error_names_a_source_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    dataset = write_tiles(tmp_path / "tiles")
    monkeypatch.setattr("pipeline.training.compose.file_facts", refuse)
    with pytest.raises(UnreadableImageError, match=r"meta\.csv: cannot be read: Permission denied"):
        composed(dataset, tmp_path / "made")


@pytest.mark.parametrize(("place", "reason"), [("made", "Not a directory"), ("images", "File exists")])
def test_the_error_names_a_folder_that_cannot_be_written(
    tiles: Dataset, tmp_path: Path, place: str, reason: str
) -> None:
    root = composed(tiles, tmp_path / "made", ("val",)).root
    folder = root.parent if place == "made" else root
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(OutputError, match=rf"made/composed-\w+: the composed images cannot be written \({reason}\)"):
        composed(tiles, tmp_path / "made", ("val",))


def test_a_data_set_without_composition_stays_itself(tiles: Dataset, tmp_path: Path) -> None:
    plain = Dataset(tiles.card.model_copy(update={"compose": None}), tiles.root)
    assert composed(plain, tmp_path) is plain


def test_whole_images_stand_beside_the_composed_ones_at_their_pixel_size(tmp_path: Path) -> None:
    dataset = with_whole_images(tmp_path)
    made = composed(dataset, tmp_path / "made")
    source = load_dataset("ebhi-seg", tmp_path / "other")

    def plain(group: str) -> str:
        return group.replace("+", "_").replace("/", "_")

    counts: dict[Split, int] = {"train": 3, "val": 2}
    for split, count in counts.items():
        own = {f"ebhi-seg-{plain(sample.group)}+{sample.name}": sample for sample in samples(source, split)}
        assert own
        found = {sample.name: sample for sample in samples(made, split)}
        assert sorted(found.keys() - own.keys()) == [f"{split}-{n:04d}" for n in range(count)]
        for name, sample in own.items():
            # 1.0 um/px in the other data set, 0.5 in the composed images.
            np.testing.assert_array_equal(read_rgb(found[name]), resampled(read_rgb(sample), 2.0))
            # "other" is class 0 there and class 1 here.
            labels_HW = 1 - read_mask(source, sample)
            np.testing.assert_array_equal(read_mask(made, found[name]), labels_HW.repeat(2, axis=0).repeat(2, axis=1))
            assert found[name].group == f"ebhi-seg-{plain(sample.group)}"
            present_BK = labeled_boxes(made, found[name]).present_BK
            # The border between both classes lies between two crops.
            assert sorted(set(map(tuple, present_BK.tolist()))) == [(False, True, False), (True, False, False)]
        alone = samples(without_whole(dataset, made), split)
        assert [sample.name for sample in alone] == [f"{split}-{n:04d}" for n in range(count)]


def test_without_whole_images_nothing_is_left_out(tiles: Dataset, tmp_path: Path) -> None:
    made = composed(tiles, tmp_path)
    assert without_whole(tiles, made) is made
    assert without_whole(made, made) is made


@pytest.mark.parametrize(
    ("other", "classes", "message"),
    [
        (
            "ebhi-seg",
            ("gland", "stroma"),
            "lacks: other; the classes of this data set are gland, stroma, glass",
        ),
        (
            "kather-2016",
            ("gland", "other"),
            "compose.whole names kather-2016, which has images without masks",
        ),
    ],
)
def test_whole_images_that_do_not_fit_are_refused_before_composing(
    tmp_path: Path, other: str, classes: tuple[str, str], message: str
) -> None:
    dataset = with_whole_images(tmp_path, *classes, other=other)
    with pytest.raises(DatasetFileError, match=message):
        composed(dataset, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_data_set_without_whole_images_keeps_its_card(tiles: Dataset, tmp_path: Path) -> None:
    """Otherwise, training that began before `compose.whole` existed would not go on."""
    made = composed(tiles, tmp_path, ("val",))
    assert made.card.images["train"][0].image == "train/img/*.jpg"
    assert made.card.group is None


def test_a_missing_folder_of_whole_images_is_an_error(tmp_path: Path) -> None:
    dataset = with_whole_images(tmp_path)
    (tmp_path / "other").rename(tmp_path / "gone")
    with pytest.raises(
        DatasetFileError, match=r"compose\.whole needs the data set ebhi-seg in .*other; the folder must"
    ):
        composed(dataset, tmp_path / "made")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('blank = "glass"', 'blank = "air"', "compose.blank is 'air', which is not a class"),
        ("side = 64", "side = 8", "compose.side"),
        ('"source"\nmpp = 0.5', '"source"\nmpp = inf', r"compose\.mpp: Input should be"),
        ("minimum = 0.05", CUT_OF_ANOTHER_CLASS, "compose.cut names c; the classes are a, b, glass"),
        ('AB = ["a", "b"]', 'AB = ["a", "c"]', "labels.folders names c"),
        (
            '"folders"',
            '"folders"\nsplits = ["train", "test"]',
            "compose needs labels in every split; add val to labels.splits",
        ),
        ("minimum = 0.05", f"minimum = 0.05\n{WHOLE}{WHOLE}", "data set in compose.whole ebhi-seg is given twice"),
    ],
)
def test_the_error_names_a_wrong_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "dataset.toml"
    file.write_text(TOML.replace(old, new))
    with pytest.raises(DatasetFileError, match=message):
        load_dataset(file)


def test_whole_images_need_a_validation_split(tmp_path: Path) -> None:
    file = tmp_path / "dataset.toml"
    file.write_text(TOML.replace('val = ["3"]', "val = []") + WHOLE)
    with pytest.raises(DatasetFileError, match=r"compose\.whole needs a validation split; set val in \[split\]"):
        load_dataset(file)


def test_an_area_of_several_classes_labels_the_crops_that_it_mostly_covers(tmp_path: Path) -> None:
    # Four crops: class a; a border of a and both; both; and glass with a corner of both.
    values_HW = np.zeros((16, 64), np.uint8)
    values_HW[:, 24:48] = 3
    values_HW[:, 48:] = 2
    values_HW[:4, 48:58] = 3
    for part in ("img", "mask"):
        (tmp_path / "train" / part).mkdir(parents=True)
    Image.new("RGB", (64, 16)).save(tmp_path / "train" / "img" / "one.jpg")
    Image.fromarray(values_HW).save(tmp_path / "train" / "mask" / "one.png")
    (tmp_path / "dataset.toml").write_text("""
        name = "areas"
        description = "One image."
        licence = "CC0"
        mpp = 1.0
        [[classes]]
        name = "a"
        mask_values = [0]
        [[classes]]
        name = "b"
        mask_values = [1]
        [[classes]]
        name = "c"
        mask_values = [2]
        [images]
        train = [{ image = "train/img/*.jpg", mask = "train/mask/{name}.png" }]
        [labels]
        source = "mask-crops"
        side = 16
        stride = 16
        minimum = 0.05
        several = { 3 = ["a", "b"] }
        """)
    dataset = load_dataset(tmp_path / "dataset.toml")
    (sample,) = samples(dataset, "train")
    labeled = labeled_boxes(dataset, sample)
    # Half of the second crop and a sixth of the fourth show both classes: their labels are not known.
    assert labeled.boxes_B4[:, 0].tolist() == [0, 32]
    assert labeled.present_BK.tolist() == [[True, False, False], [True, True, False]]
    assert (read_mask(dataset, sample) == IGNORED).sum() == (values_HW == 3).sum()
