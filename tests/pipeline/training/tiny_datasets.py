"""Small data sets of every form, written into a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.training.dataset import Sample

HEAD = """
name = "tiny"
description = "Made by a test."
licence = "CC0"
mpp = 0.5
mask_excluded = [4]
classes = [
    { name = "red", color = [200, 0, 0], mask_values = [0] },
    { name = "blue", color = [0, 0, 200], mask_values = [1, 2] },
]
"""


FILE_NAME_LABELS = """
[images]
train = [{ image = "train/*.png" }, { image = "training/*.png" }]
val = [{ image = "val/img/*.png", mask = "val/mask/{name}.png" }]
[labels]
source = "file-name"
splits = ["train"]
"""


CROP_LABELS = """
[images]
train = [{ image = "img/*.png", mask = "mask/{name}.png" }]
[labels]
source = "mask-crops"
side = 8
stride = 4
minimum = 0.05
"""


TABLE_LABELS = """
[images]
all = [{ image = "img/*.png" }]
[table]
files = ["meta.csv"]
[group]
column = "patient"
[split]
by = "table"
val = []
test = ["testA", "testB"]
val_groups = ["p2"]
[labels]
source = "csv"
"""


def put(folder: Path, toml: str) -> Path:
    file = folder / "dataset.toml"
    file.write_text(toml, encoding="utf-8")
    return file


def image(file: Path, width: int = 12, height: int = 10, value: int = 90) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 20, 30)).save(file)
    return file


def mask(file: Path, values_HW: NDArray[np.uint8], mode: str = "P") -> Path:
    """Write a mask whose palette colors and gray values differ from its indices."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(values_HW)
    if mode == "P":
        made.putpalette([(37 * i + 90) % 256 for i in range(3 * 256)])
    made.save(file)
    return file


def plain(value: int = 0, width: int = 12, height: int = 10) -> NDArray[np.uint8]:
    return np.full((height, width), value, dtype=np.uint8)


def table(folder: Path, rows: list[str], header: str = "name,patient,split,red,blue") -> None:
    (folder / "meta.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def names(chosen: tuple[Sample, ...]) -> list[str]:
    return [sample.name for sample in chosen]
