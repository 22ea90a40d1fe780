from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EmptyClassError
from pipeline.training.dataset import load_dataset
from pipeline.training.taught_classes import check_classes
from tests.pipeline.training.tiny_datasets import CROP_LABELS, HEAD, put

ONLY_RED = np.array([[True, False], [True, False]])
BOTH = np.array([[False, False], [True, True]])


def test_the_error_names_a_class_without_a_training_patch(tmp_path: Path) -> None:
    dataset = load_dataset(put(tmp_path, HEAD + CROP_LABELS))
    check_classes(dataset, [ONLY_RED, BOTH])
    with pytest.raises(
        EmptyClassError, match=r"tiny: none of the 4 training patches contains class blue;.*wsi-label classes --remove"
    ):
        check_classes(dataset, [ONLY_RED, ONLY_RED], [ONLY_RED], ["P3"])
    with pytest.raises(EmptyClassError, match="none of the 0 training patches contains class red, blue"):
        check_classes(dataset, [])


VAL = 'val = [{ image = "val/*.png", mask = "mask/{name}.png" }]\n'


@pytest.mark.parametrize(
    ("val", "place"), [("", "held out for validation"), (VAL, "in split val")], ids=["held-out", "val"]
)
def test_the_error_names_the_groups_of_a_class_that_only_validation_images_have(
    tmp_path: Path, val: str, place: str
) -> None:
    dataset = load_dataset(put(tmp_path, HEAD + CROP_LABELS.replace("[labels]", val + "[labels]")))
    with pytest.raises(EmptyClassError, match=rf"tiny: all images of class blue \(group\(s\) P3\) are {place}; add"):
        check_classes(dataset, [ONLY_RED], [BOTH, BOTH, ONLY_RED], ["P3", "P3", "P4"])
    with pytest.raises(
        EmptyClassError, match=f"all images of class blue are {place}; add training images of this class"
    ):
        check_classes(dataset, [ONLY_RED], [BOTH], [""])
