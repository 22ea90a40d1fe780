"""Images that the patterns of a data set miss are counted and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import MissingImagesError
from pipeline.training.dataset import Dataset, load_dataset, samples
from tests.pipeline.training.tiny_datasets import CROP_LABELS, FILE_NAME_LABELS, HEAD, image, mask, names, plain, put


def in_folders(folder: Path, patterns: list[str]) -> Dataset:
    """Return a data set whose class folders hold images in several formats, found by alternative patterns."""
    for name in ("red/a.png", "red/b.PNG", "blue/c.tif", "blue/d.png"):
        image(folder / "x" / name)
    places = ", ".join(f'{{ image = "{pattern}" }}' for pattern in patterns)
    text = HEAD.replace("mask_excluded = [4]\n", "") + f'[images]\ntrain = [{places}]\n[labels]\nsource = "folders"\n'
    return load_dataset(put(folder, text))


def test_a_warning_counts_images_that_only_a_later_pattern_or_another_case_finds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(samples(in_folders(tmp_path, ["x/*/*.png", "x/*/*.tif"]), "train")) == ["a", "d"]
    (message,) = caplog.messages
    assert f"tiny: 2 image(s) are not used, such as {tmp_path / 'x/blue/c.tif'}; only 'x/*/*.png' counts" in message
    assert message.endswith("to use all images, replace it with the pattern 'x/*/*'")
    caplog.clear()
    (tmp_path / "x" / "blue" / "notes.txt").write_text("text")
    samples(in_folders(tmp_path, ["x/*/*.png"]), "train")
    (message,) = caplog.messages
    assert "1 image(s) are not used" in message
    assert message.endswith("replace it with the pattern 'x/*/*.[pP][nN][gG]'")
    caplog.clear()
    samples(in_folders(tmp_path, ["x/*/*.tif", "x/*/*.png"]), "train")
    (message,) = caplog.messages
    assert "3 image(s) are not used" in message
    assert message.endswith("replace it with one pattern that finds all of them")


@pytest.mark.parametrize("case", ["jpg", "JPG"])
def test_masks_are_not_reported_as_unused_and_no_suggested_pattern_finds_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    for file in ("a.jpg", f"b.{case}"):
        image(tmp_path / "train" / file)
        mask(tmp_path / "train" / f"{file[0]}_mask.png", plain())
    places = ", ".join(f'{{ image = "train/*.{end}", mask = "train/{{name}}_mask.png" }}' for end in ("jpg", "png"))
    text = CROP_LABELS.replace('{ image = "img/*.png", mask = "mask/{name}.png" }', places)
    dataset = load_dataset(put(tmp_path, HEAD + text))

    used = names(samples(dataset, "train"))
    if case == "jpg":
        assert (used, caplog.messages) == (["a", "b"], [])
    else:
        (message,) = caplog.messages
        assert f"tiny: 1 image(s) are not used, such as {tmp_path / 'train/b.JPG'};" in message
        assert (used, message.rpartition("; to use all images, ")[2]) == (
            ["a"],
            "replace it with the pattern 'train/*.[jJ][pP][gG]'",
        )


def test_images_and_masks_of_another_split_are_not_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path / "train" / "a[10].png")
    image(tmp_path / "val" / "v.png")
    mask(tmp_path / "val" / "v_mask.png", plain())
    text = FILE_NAME_LABELS.replace("training/*.png", "*/*.png").replace("val/img/*.png", "val/?.png")
    dataset = load_dataset(put(tmp_path, HEAD + text.replace("val/mask/{name}.png", "val/{name}_mask.png")))

    assert names(samples(dataset, "train")) == ["a[10]"]
    assert caplog.messages == []
    image(tmp_path / "new" / "b.png")
    samples(dataset, "train")
    (message,) = caplog.messages
    assert f"1 image(s) are not used, such as {tmp_path / 'new/b.png'};" in message
    assert message.endswith("replace it with one pattern that finds all of them")


def test_copies_in_another_format_are_no_reason_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = in_folders(tmp_path, ["x/*/*.[pP][nN][gG]", "x/*/*.tif"])
    image(tmp_path / "x" / "blue" / "c.png")
    assert names(samples(dataset, "train")) == ["a", "b", "c", "d"]
    assert not caplog.messages


def test_the_error_names_images_that_only_the_case_of_the_ending_hides(tmp_path: Path) -> None:
    with pytest.raises(MissingImagesError, match=r"1 image\(s\), such as c.tif, match a pattern except for the case"):
        samples(in_folders(tmp_path, ["x/*/*.TIF"]), "train")
